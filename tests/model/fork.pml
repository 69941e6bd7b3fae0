/* Fork: the prepare handler takes a slot for the child and copies the parent's holds into it.
 * A parent of two threads, one that forks and one that loads and lets go, and the child. Block 0 is used by all of
 * them; in block 1 a peer that died has left its bit, in the slot that the child will get. Either the owner lives and
 * publishes block 0 anew, or the arena is an orphan (ORPHAN) that whoever lets go of its last use removes.
 */
#ifndef MUTANT
#define MUTANT 0
#endif
#ifndef WITNESS
#define WITNESS 0
#endif
#ifndef ORPHAN
#define ORPHAN 0
#endif
#ifndef LOADS                    /* by the parent's second thread */
#define LOADS 1
#endif
#ifndef RETIRES
#define RETIRES 2
#endif
#ifndef SWEEPS
#define SWEEPS 0
#endif
#ifndef KILLS                    /* of the parent or the child */
#define KILLS 0
#endif

#define OWNER  0
#define PARENT 1
#define CHILD  2
#define SLOTS  3
#define BIT(p) (1 << (p))
#define NONE   255
#define STUCK  12
#define FREE   0
#define TAKEN(p) ((p) + 1)
#define SWEEPER  3
#define LAST     4

/* a situation that the model must be able to reach: the run with -DWITNESS=k fails when it is met */
#define MET(k) assert(WITNESS != (k))

/* a property by the number of its rule, so that a failure names what it breaks; STUCK: everybody comes to an end */
#define RULE(k, property) assert((k) > 0 && (property))

/* shared memory; a closing of the block and a closing of the arena are one protocol, see block.pml and arena.pml */
byte generation = 2;
byte holds[2];

/* kernel locks. A slot's lock lasts as long as a process maps its page; a sweep takes it for a moment */
byte mappers[SLOTS];             /* a bit for each process */
byte probed[SLOTS];              /* FREE, or TAKEN(by) */
byte owner_lock;                 /* who reaps has it */

/* private to a process, by its slot */
byte count[SLOTS];               /* uses of block 0 */
byte uses[SLOTS];                /* uses of the arena */
bool private_lock[SLOTS];

/* what the rules promise; no decision of the protocol reads it */
byte content = 2;
byte using[SLOTS];               /* threads between a load, or the fork, and their release */
bool forked;
bool child_ended;
bool abandoned;                  /* the child has a use of a thread that is not in it */
byte dying = NONE;
byte kills;
byte running;                    /* threads of the parent */
bool finished;

inline acquire(p) { d_step { !private_lock[p] -> private_lock[p] = true } }

/* with the slot's lock free, for the time of it */
inline sweep(me, p) {
  if
  :: d_step { mappers[p] == 0 && probed[p] == FREE -> probed[p] = TAKEN(me) };
     holds[0] = holds[0] & ~BIT(p);
     holds[1] = holds[1] & ~BIT(p);
     probed[p] = FREE
  :: mappers[p] != 0
  fi
}

/* leaves ok: whether nothing is held and the caller has closed the block, or the arena, for good */
inline retire() {
  g = generation - generation % 2;
  d_step { if :: generation == g -> generation = g + 1 :: else fi };
  ok = (holds[0] == 0);
  if :: ok -> ok = (holds[1] == 0) :: else fi;
  if
  :: ok ->
     d_step {
       ok = (generation == g + 1);
       if :: ok -> generation = g + 2; RULE(1, using[PARENT] + using[CHILD] == 0) :: else fi
     }
  :: else -> d_step { if :: generation == g + 1 -> generation = g :: else fi }
  fi;
  g = 0
}

/* in an orphan the generation stands for the lifecycle: 2 open, 3 closing, 4 gone */
inline reap(me) {
  do
  :: again ->
     again = false;
     if
     :: d_step { owner_lock == FREE -> owner_lock = TAKEN(me) };
        sweep(me, PARENT); sweep(me, CHILD);
        if :: generation == 4 :: generation != 4 -> retire() fi;
        owner_lock = FREE;
        if :: generation != 4 -> again = (holds[0] == 0); if :: again -> again = (holds[1] == 0) :: else fi :: else fi;
        ok = false
     :: owner_lock != FREE
     fi
  :: else -> break
  od
}

inline load(p) {
  acquire(p);
  holds[0] = holds[0] | BIT(p);
  do
  :: generation == 2 -> ok = true; break
  :: d_step { generation == 3 -> generation = 2 }; MET(1)              /* a load meets a closing */
  :: generation > 3 -> break
  od;
  if
  :: ok -> d_step { count[p]++; using[p]++ }; uses[p]++
  :: count[p] == 0 && !ok -> holds[0] = holds[0] & ~BIT(p)
  :: else
  fi;
  private_lock[p] = false
}

inline let_go(p) {
  acquire(p);
  d_step { RULE(1, content == 2); using[p]--; count[p]-- };
  if :: count[p] == 0 -> holds[0] = holds[0] & ~BIT(p) :: else fi;
  private_lock[p] = false;
  d_step { uses[p]--; again = (uses[p] == 0) };                        /* the second count */
  again = again && ORPHAN;
  reap(p)
}

inline copy_holds() {
  if :: count[PARENT] != 0 -> holds[0] = holds[0] | BIT(CHILD) :: else fi
}

inline take_slot() {
  d_step { mappers[CHILD] == 0 && probed[CHILD] == FREE -> mappers[CHILD] = BIT(PARENT) }
}

inline clear_slot() {
#if MUTANT != 3
  holds[0] = holds[0] & ~BIT(CHILD);
  holds[1] = holds[1] & ~BIT(CHILD)
#else
  skip
#endif
}

#if KILLS > 0
#define UNLESS_KILLED(p) unless { (dying & BIT(p)) && dying != NONE }
#else
#define UNLESS_KILLED(p)
#endif

/* at first it has a use of block 0; if it keeps it the child gets it, too */
proctype forker() {
  bool ok, again, own = true;
  byte g;

  {
    if :: let_go(PARENT); own = false :: skip fi;
#if MUTANT != 6
    acquire(PARENT);
#endif
    if
    :: uses[PARENT] == 0                                               /* nothing to inherit */
#if MUTANT != 7
    :: uses[PARENT] != 0 && count[PARENT] == 0 -> MET(2)               /* neither: the second count is still to fall */
#endif
    :: else ->
#if MUTANT == 2
       clear_slot(); copy_holds(); take_slot();
#else
       take_slot(); clear_slot();
#if MUTANT != 1
       copy_holds();
#endif
#endif
#if MUTANT == 4
       mappers[CHILD] = 0;
#endif
       /* the fork */
       atomic {
         d_step {
           forked = true;
           count[CHILD] = count[PARENT];
           uses[CHILD] = uses[PARENT];
           private_lock[CHILD] = private_lock[PARENT];
           using[CHILD] = own;
           abandoned = (count[CHILD] > own);
#if MUTANT != 4
           mappers[CHILD] = BIT(PARENT) | BIT(CHILD)
#else
           skip
#endif
         };
         run child()
       };
       mappers[CHILD] = mappers[CHILD] & ~BIT(PARENT)
    fi;
#if MUTANT != 6
    private_lock[PARENT] = false;
#endif
    if :: own -> let_go(PARENT) :: else fi;
    running--
  } UNLESS_KILLED(PARENT)
}

proctype other() {
  bool ok, again;
  byte g, loads;

  {
    do
    :: loads < LOADS ->
       loads++;
       load(PARENT);
       if
       :: ok -> ok = false; let_go(PARENT)
       :: else -> again = (uses[PARENT] == 0) && ORPHAN; reap(PARENT)
       fi
    :: else -> break
    od;
    running--
  } UNLESS_KILLED(PARENT)
}

proctype child() {
  bool ok, again;
  byte g;

  {
#if MUTANT != 5
    uses[CHILD] = count[CHILD];
#endif
#if MUTANT == 1
    if :: count[CHILD] > 0 -> holds[0] = holds[0] | BIT(CHILD) :: else fi;
#endif
    private_lock[CHILD] = false;
    if
    :: using[CHILD] > 0 ->
       MET(3);                                                         /* the child has inherited a use */
       if :: using[PARENT] == 0 -> MET(4) :: else fi;                  /* and outlives the parent's */
       let_go(CHILD)
    :: else
    fi;
    /* it stays, until everything else is done */
    finished;
    child_ended = true
  } UNLESS_KILLED(CHILD)
}

proctype owner() {
  bool ok;
  byte g, retires;

  do
  :: !ORPHAN && retires < RETIRES && content == 2 ->
     retires++;
     retire();
     if :: ok -> d_step { RULE(1, using[PARENT] + using[CHILD] == 0); content = 4; ok = false } :: else fi
  :: break
  od
}

proctype sweeper() {
  byte sweeps;

  do
  :: sweeps < SWEEPS -> sweeps++; sweep(SWEEPER, CHILD)
  :: else -> break
  od
}

#define UNLOCK(p) \
  if :: owner_lock == TAKEN(p) -> owner_lock = FREE :: else fi; \
  if :: probed[PARENT] == TAKEN(p) -> probed[PARENT] = FREE :: else fi; \
  if :: probed[CHILD] == TAKEN(p) -> probed[CHILD] = FREE :: else fi

proctype killer() {
  if
  :: skip
  :: d_step {
       KILLS > 0 && running > 0 ->
       dying = BIT(PARENT); kills++; running = 0;
       using[PARENT] = 0; mappers[PARENT] = 0; mappers[CHILD] = mappers[CHILD] & ~BIT(PARENT);
       UNLOCK(PARENT)
     };
     if :: mappers[CHILD] != 0 -> MET(5) :: else fi                    /* the parent dies, its child lives */
  :: d_step {
       KILLS > 0 && forked && !child_ended ->
       dying = BIT(CHILD); kills++; child_ended = true;
       using[CHILD] = 0; mappers[CHILD] = mappers[CHILD] & ~BIT(CHILD);
       UNLOCK(CHILD)
     };
     MET(6)                                                            /* the child dies, maybe before its first step */
  fi
}

/* everything is let go: no bit is left but of uses that nobody in the child can end, and an orphan is removed */
proctype last() {
  bool ok, again;
  byte g;

  timeout;                       /* nobody else can do anything */
  RULE(STUCK, running == 0 && using[CHILD] == 0);
  if
  :: kills > 0 || abandoned || !forked ->
     /* somebody who comes by */
     if :: abandoned -> mappers[CHILD] = 0 :: else fi;                 /* such a child ends its uses with itself */
     sweep(LAST, PARENT); sweep(LAST, CHILD);
     if :: ORPHAN -> again = true; reap(LAST) :: else fi
  :: else
  fi;
  RULE(6, holds[0] == 0 && holds[1] == 0);
  RULE(7, !ORPHAN || generation == 4);
  finished = true
}

init {
  atomic {
    holds[0] = BIT(PARENT); holds[1] = BIT(CHILD);
    count[PARENT] = 1; uses[PARENT] = 1; using[PARENT] = 1;
    mappers[PARENT] = BIT(PARENT);
    running = 2;
    run forker(); run other(); run owner(); run last();
    if :: SWEEPS > 0 -> run sweeper() :: else fi;
    if :: KILLS > 0 -> run killer() :: else fi
  }
}
