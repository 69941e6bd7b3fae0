/* Threads of one process share a hold bit: a private count and the bit change together under a private lock
 * of the block, and a private count of the arena tells which thread ended the last hold of the process.
 * Two blocks; block 0 is reused once while threads of a peer and of the owner load it, then the owner leaves.
 * The loads are unannounced: tickets are in block.pml and arena.pml.
 */
#ifndef MUTANT
#define MUTANT 0
#endif
#ifndef WITNESS
#define WITNESS 0
#endif
#ifndef OLD                      /* threads of the peer whose handle is stale from the start */
#define OLD 1
#endif
#ifndef OTHER                    /* threads of the peer that load block 1 */
#define OTHER 1
#endif

#define OWNER  0
#define PEER   1
#define BIT(p) (1 << (p))

/* a situation that the model must be able to reach: the run with -DWITNESS=k fails when it is met */
#define MET(k) assert(WITNESS != (k))

/* a property by the number of its rule, so that a failure names what it breaks */
#define RULE(k, property) assert((k) > 0 && (property))

/* shared memory */
mtype = { open, closing, gone };
mtype lifecycle = open;
byte generation[2];
byte holds[2];
byte content;                    /* the generation whose bytes lie in block 0; block 1 is never reused */
bool owner_left;
bool owner_lock = true;          /* between processes, and by probe_mutex between the threads of one */

/* private to a process; the index is 2 * process + block */
bool private_lock[4];
byte count[4];
byte arena_count[2];

/* what the rules promise; no decision of the protocol reads it */
byte using[4];                   /* threads between a successful load and their release */
byte running[2];

#define MINE (2 * me + b)
#define HELD(p, block) (holds[block] & BIT(p))

inline acquire() {
#if MUTANT == 1
  skip
#else
  d_step { !private_lock[MINE] -> private_lock[MINE] = true }
#endif
}

inline give_back() {
#if MUTANT == 1
  skip
#else
  private_lock[MINE] = false
#endif
}

inline clear_bit() {
  d_step {
    RULE(1, using[MINE] == 0);
    holds[b] = holds[b] & ~BIT(me)
  }
}

inline scan() {
  idle = true;
  if :: holds[0] != 0 -> idle = false :: else fi;
  if :: idle && holds[1] != 0 -> idle = false :: else fi
}

#define CAS_LIFECYCLE(from, to) \
  d_step { \
    ok = (lifecycle == from); \
    if :: ok -> lifecycle = to :: else fi; \
    RULE(1, lifecycle != gone || using[0] + using[1] + using[2] + using[3] == 0) \
  }

/* arena.pml has this in full */
inline reap() {
  do
  :: again ->
     again = false;
     if
     :: d_step { !owner_lock -> owner_lock = true };
        if
        :: lifecycle == open ->
           CAS_LIFECYCLE(open, closing);
           scan();
           if
           :: idle -> CAS_LIFECYCLE(closing, gone)
           :: else -> CAS_LIFECYCLE(closing, open)
           fi
        :: else
        fi;
        owner_lock = false;
        scan();
        again = (idle && lifecycle != gone);
        idle = false; ok = false
     :: else
     fi
  :: else -> break
  od
}

inline drop_arena_count() {
  d_step { arena_count[me]--; last = (arena_count[me] == 0) }
}

/* last: no thread of this process holds anything; said after the bit was cleared, by a release or a stale load */
inline reap_if_last() {
  if
  :: last -> last = false; again = owner_left; reap()
  :: else -> MET(3)                                                    /* another thread still holds */
  fi
}

/* leaves ok: whether this thread holds the block for generation g */
inline load() {
  acquire();
  holds[b] = holds[b] | BIT(me);
  seen = generation[b];
  do
  :: seen == g -> ok = true; break
  :: seen == g + 1 ->
     d_step {
       if
       :: generation[b] == seen -> seen--; generation[b] = seen
       :: else -> seen = generation[b]
       fi
     }
  :: else -> break
  od;
  seen = 0;
  if
  :: ok ->
     state = lifecycle;
     do
     :: state == closing ->
        d_step {
          if :: lifecycle == closing -> lifecycle = open; state = open :: else -> state = lifecycle fi
        }
     :: state == open -> break
     :: state == gone -> ok = false; break
     od;
     state = 0
  :: else
  fi;
  if
  :: ok ->
     d_step {
       RULE(1, HELD(me, b));
       RULE(3, b == 1 || content == g);
       count[MINE]++; arena_count[me]++; using[MINE]++
     }
  :: else ->
     if
     :: count[MINE] == 0 || MUTANT == 2 -> clear_bit()
     :: else -> MET(1)                                                 /* stale, and another thread holds */
     fi
  fi;
  give_back()
}

inline release() {
#if MUTANT == 5
  drop_arena_count();
#endif
  acquire();
  d_step {
    RULE(1, b == 1 || content == g);
    using[MINE]--; count[MINE]--; ok = (count[MINE] == 0)
  };
#if MUTANT == 3
  give_back();
#endif
  if
  :: ok -> clear_bit()
  :: else -> MET(2)                                                    /* the count keeps the bit */
  fi;
#if MUTANT != 3
  give_back();
#endif
#if MUTANT != 5
  drop_arena_count();
#endif
  ok = false
}

proctype thread(byte me; byte b; byte g) {
  mtype state;
  byte seen;
  bool ok, last, idle, again;

  load();
  if
  :: ok -> ok = false; release(); reap_if_last()
  :: else ->
#if MUTANT != 6
     last = (arena_count[me] == 0);
     reap_if_last()
#endif
  fi;
  running[me]--
}

proctype owner() {
  mtype state;
  byte seen, b, me = OWNER, g = 2;
  bool ok, last, idle, again;

  generation[0] = 3;
  if
  :: holds[0] == 0 ->
     d_step { ok = (generation[0] == 3); if :: ok -> generation[0] = 4 :: else fi }
  :: else ->
     d_step { if :: generation[0] == 3 -> generation[0] = 2 :: else fi }
  fi;
  if
  :: ok ->
     g = 4;
#if MUTANT != 4
     acquire();
#endif
     holds[0] = holds[0] | BIT(me);
     d_step { count[MINE]++; arena_count[me]++; using[MINE]++ };
#if MUTANT != 4
     give_back();
#endif
     d_step {
       RULE(1, using[2] == 0);
       content = g
     };
     RULE(1, HELD(me, 0));
     ok = false;
     release();
     reap_if_last();
     MET(4)                                                            /* the block was reused */
  :: else
  fi;

  running[OWNER] == 0;           /* the owner leaves when its last use has ended */
  owner_left = true;
  owner_lock = false;
  again = true;
  reap();
  running[PEER] == 0;
  RULE(7, lifecycle == gone)                                           /* the last thread to end a hold reaps */
}

init {
  atomic {
    generation[0] = 2; generation[1] = 2; content = 2;
    run owner();
    run thread(OWNER, 0, 2);
    run thread(PEER, 0, 2); run thread(PEER, 0, 2);
    running[OWNER] = 1; running[PEER] = 2 + OLD + OTHER;
    if :: OLD > 0 -> run thread(PEER, 0, 0) :: else fi;
    if :: OTHER > 0 -> run thread(PEER, 1, 2) :: else fi
  }
}
