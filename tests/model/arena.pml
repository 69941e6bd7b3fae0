/* The end of an arena: owner exit, reaping by releasing peers and by a later reaper, kills of any of them.
 * Two blocks, one lifecycle word. Generations are left out: only who has the owner lock changes them, and a
 * reaper does not. A load with a stale handle shows here as a bit that is set and cleared again. The look at
 * the blocks that the code takes before it closes the arena is left out: it decides nothing.
 */
#ifndef MUTANT
#define MUTANT 0
#endif
#ifndef WITNESS
#define WITNESS 0
#endif
#ifndef READERS                  /* loads that the owner's message in block 0 announces */
#define READERS 1
#endif
#ifndef FORWARDS                 /* 1: a holder sends one message on */
#define FORWARDS 1
#endif
#ifndef LATE                     /* unannounced loads */
#define LATE 1
#endif
#ifndef STALE                    /* loads with a stale handle */
#define STALE 1
#endif
#ifndef LEFT                     /* 1: owner_left from the start, so that every releasing peer is a reaper */
#define LEFT 0
#endif
#ifndef KILLS_OWNER
#define KILLS_OWNER 0
#endif
#ifndef KILLS_PEER
#define KILLS_PEER 0
#endif
#ifndef COLLECTS                 /* runs of a reaper that is no peer, at any time */
#define COLLECTS 0
#endif

#define KILLS     (KILLS_OWNER + KILLS_PEER)
#define OWNER     0
#define VICTIM    1              /* the peer that may be killed */
#define SLOTS     3
#define CELLS     3
#define COLLECTOR 3              /* a reaper that is no peer */
#define BIT(p)    (1 << (p))
#define NONE      255

/* a situation that the model must be able to reach: the run with -DWITNESS=k fails when it is met */
#define MET(k) assert(WITNESS != (k))

/* a property by the number of its rule, so that a failure names what it breaks */
#define RULE(k, property) assert((k) > 0 && (property))

/* shared memory */
mtype = { open, closing, gone };
mtype lifecycle = open;
byte holds[2];
byte remaining[CELLS];           /* 0 and 1 in block 0, the owner's and a forwarder's; 2 in block 1 */
bool owner_left = LEFT;

/* the names; the data segments are found through the control segment */
bool control_name = true;
bool data_name = true;

/* kernel locks; byte 0 is the owner lock and the owner's slot. FREE, or TAKEN(by) */
#define FREE     0
#define TAKEN(p) ((p) + 1)
byte lock[SLOTS];

/* what the rules promise; no decision of the protocol reads it. A message is its cell. */
byte to_come[CELLS];
byte due[CELLS];
bool sent[CELLS];
byte forwards = FORWARDS;
byte late = LATE;
byte stale = STALE;
bool using[SLOTS];               /* from a successful load to its release */
bool busy[SLOTS];
byte kills;
bool owner_killed;
byte dying = NONE;
bool finished;

inline send(cell, n) {
  remaining[cell] = n;
  d_step { to_come[cell] = n; due[cell] = n; sent[cell] = true }
}

/* with the owner lock: bits of slots whose process is dead */
inline sweep(me) {
  holds[0] = holds[0] & ~BIT(OWNER);
  holds[1] = holds[1] & ~BIT(OWNER);
  p = 1;
  do
  :: p < SLOTS ->
     d_step { got = (lock[p] == FREE); if :: got -> lock[p] = TAKEN(me) :: else fi };
     if
     :: got ->
        holds[0] = holds[0] & ~BIT(p);
        holds[1] = holds[1] & ~BIT(p);
        lock[p] = FREE
     :: else
     fi;
     p++
  :: else -> break
  od;
  p = 0;
  got = false
}

#define CHECK(word) if :: idle && word != 0 -> idle = false :: else fi

/* leaves idle: whether no hold and no ticket is left */
inline scan() {
  idle = true;
#if MUTANT == 1
  CHECK(remaining[0]); CHECK(remaining[1]); CHECK(holds[0]);
  CHECK(remaining[2]); CHECK(holds[1])
#else
  CHECK(holds[0]); CHECK(remaining[0]); CHECK(remaining[1]);
  CHECK(holds[1]); CHECK(remaining[2])
#endif
}

#define CAS_LIFECYCLE(from, to) \
  d_step { \
    got = (lifecycle == from); \
    if :: got -> lifecycle = to :: else fi; \
    RULE(1, lifecycle != gone || !using[1] && !using[2]) \
  }

/* leaves again: whether everything was idle after all when the caller had given up and unlocked */
inline reap(me) {
  do
  :: again ->
     again = false;
#if MUTANT == 10
     got = (lock[OWNER] == FREE);
#else
     d_step {
       got = (lock[OWNER] == FREE);
       if :: got -> lock[OWNER] = TAKEN(me) :: else fi
     };
#endif
     if
     :: got ->
        sweep(me);
        state = lifecycle;
#if MUTANT == 2
        scan();
        if
        :: state == gone
        :: state != gone && idle -> CAS_LIFECYCLE(open, gone); if :: got -> state = gone :: else fi
        :: state != gone && !idle
        fi;
#else
        if
        :: state == gone -> MET(4)                                     /* a reaper died while it removed names */
        :: else ->
           if
           :: state == open -> CAS_LIFECYCLE(open, closing)
           :: else -> MET(3)                                           /* a reaper died while it was closing */
           fi;
           scan();
           if
           :: idle -> CAS_LIFECYCLE(closing, gone); if :: got -> state = gone :: else fi
           :: else -> CAS_LIFECYCLE(closing, open)
           fi
        fi;
#endif
        if
        :: state == gone && (MUTANT != 8 || got) ->
#if MUTANT == 11
           control_name = false;
           data_name = false
#else
           data_name = false;
           control_name = false
#endif
        :: else
        fi;
#if MUTANT != 10
        lock[OWNER] = FREE;
#endif
        if
        :: state == gone ->
           if
           :: me != OWNER && me != COLLECTOR ->
              MET(8);                                                  /* a releasing peer reaps */
              if :: owner_killed -> MET(9) :: else fi                 /* and the owner was killed */
           :: else
           fi
        :: else ->
#if MUTANT == 12
           again = true
#elif MUTANT != 5
           scan();
           if
           :: idle -> MET(5); again = true                             /* the last release met a taken lock */
           :: else
           fi
#endif
        fi
     :: else -> MET(6)                                                 /* another reaper is at it */
     fi;
     d_step { got = false; idle = false; state = 0 }
  :: else -> break
  od
}

/* after any bit of the caller was cleared, by a release or by a load that turned out stale */
inline hold_ended(me) {
  again = owner_left;
  reap(me)
}

proctype owner() {
  mtype state;
  byte p;
  bool got, idle, again;

  {
    send(0, READERS);
    send(2, 1);
#if MUTANT != 6
    owner_left = true;
#endif
    holds[0] = holds[0] & ~BIT(OWNER);
    holds[1] = holds[1] & ~BIT(OWNER);
    lock[OWNER] = FREE;
    again = true;
    reap(OWNER);
#if MUTANT == 6
    owner_left = true;
#endif
    busy[OWNER] = false
  }
#if KILLS_OWNER > 0
  unless {
    d_step { dying == OWNER; dying = NONE; state = 0; p = 0; got = false; idle = false; again = false }
  }
#endif
}

#define ANNOUNCED(cell) \
  :: d_step { !finished && to_come[cell] > 0 -> to_come[cell]--; m = cell; b = cell / 2; busy[me] = true }
#define UNANNOUNCED(block) \
  :: d_step { !finished && late > 0 && sent[2 * block] -> late--; m = NONE; b = block; busy[me] = true }

inline read_lifecycle() {
  d_step { state = lifecycle; RULE(2, state != gone || m == NONE || due[m] == 0) }
}

inline load(me) {
#if MUTANT == 4
  read_lifecycle();
  holds[b] = holds[b] | BIT(me);
#else
  holds[b] = holds[b] | BIT(me);
  read_lifecycle();
#endif
  do
  :: state == open -> break
  :: state == closing ->
#if MUTANT == 3
     state = open
#else
     d_step {
       if :: lifecycle == closing -> lifecycle = open; state = open :: else -> state = lifecycle fi;
       RULE(2, state != gone || m == NONE || due[m] == 0)
     };
     MET(1)                                                            /* a load meets a closing arena */
#endif
  :: else -> break
  od;
  if
  :: state == open ->
     d_step {
       if
       :: m != NONE ->
          if :: remaining[m] > 0 -> remaining[m]--; due[m]-- :: else fi
       :: else
       fi;
       RULE(1, lifecycle != gone);
       using[me] = true
     }
  :: else
  fi
}

proctype peer(byte me) {
  mtype state;
  byte p, m, b;
  bool got, idle, again;

  {
    do
    :: if
       ANNOUNCED(0)
       ANNOUNCED(1)
       ANNOUNCED(2)
       UNANNOUNCED(0)
       UNANNOUNCED(1)
       fi;
       load(me);
       if
       :: state == open ->
          d_step { state = 0; m = 0 };
          if
          :: d_step { b == 0 && forwards > 0 -> forwards-- };
             send(1, 1)
          :: skip
          fi;
#if MUTANT == 9
          again = owner_left;
          d_step { holds[b] = holds[b] & ~BIT(me); using[me] = false; b = 0 };
          reap(me);
#else
          d_step { holds[b] = holds[b] & ~BIT(me); using[me] = false; b = 0 };
          hold_ended(me);
#endif
       :: else ->
          MET(2);                                                      /* a load finds the arena gone */
          d_step { holds[b] = holds[b] & ~BIT(me); state = 0; m = 0; b = 0 }
       fi;
       busy[me] = false
    :: d_step { !finished && stale > 0 -> stale--; busy[me] = true };
       if :: skip :: b = 1 fi;
       holds[b] = holds[b] | BIT(me);
       d_step { holds[b] = holds[b] & ~BIT(me); b = 0 };
#if MUTANT != 7
       hold_ended(me);
#endif
       busy[me] = false
    :: finished -> break
    od
  }
#if KILLS_PEER > 0
  unless {
    d_step {
      dying == me;
      dying = NONE; state = 0; p = 0; m = 0; b = 0; got = false; idle = false; again = false
    }
  }
#endif
}

proctype collector() {
  mtype state;
  byte p, lost;
  bool got, idle, again;

  if
  :: COLLECTS > 0 -> again = control_name; reap(COLLECTOR)
  :: else
  fi;
  skip;                          /* spin cannot leave a loop into a d_step */

  /* everything is consumed, released and done with: nothing of the arena may stay */
  d_step {
    !busy[OWNER] && !busy[1] && !busy[2] && dying == NONE &&
    to_come[0] == 0 && to_come[1] == 0 && to_come[2] == 0 ->
    finished = true;
    do
    :: p < CELLS -> if :: remaining[p] > 0 -> lost++; remaining[p] = 0 :: else fi; p++
    :: else -> break
    od;
    RULE(6, lost <= kills);                                            /* a dead process loses one message at most */
    p = 0; lost = 0
  };
  if
  :: kills > 0 -> again = control_name; reap(COLLECTOR); MET(7)        /* nobody else need have come after the kill */
  :: else
  fi;
  RULE(7, lifecycle == gone && !control_name && !data_name)
}

proctype killer() {
  byte p;

end:
  do
  :: d_step {
       KILLS_OWNER > 0 && busy[OWNER] && !finished && dying == NONE ->
       kills++; dying = OWNER; owner_killed = true; busy[OWNER] = false;
       do
       :: p < SLOTS -> if :: lock[p] == TAKEN(OWNER) -> lock[p] = FREE :: else fi; p++
       :: else -> break
       od;
       p = 0
     }
  :: d_step {
       KILLS_PEER > 0 && lock[VICTIM] == TAKEN(VICTIM) && !finished && dying == NONE ->
       kills++; dying = VICTIM; busy[VICTIM] = false; using[VICTIM] = false;
       do
       :: p < SLOTS -> if :: lock[p] == TAKEN(VICTIM) -> lock[p] = FREE :: else fi; p++
       :: else -> break
       od;
       p = 0
     }
  od
}

init {
  atomic {
    holds[0] = BIT(OWNER); holds[1] = BIT(OWNER);
    lock[0] = TAKEN(0); lock[1] = TAKEN(1); lock[2] = TAKEN(2);
    busy[OWNER] = true;
    run owner(); run peer(1); run peer(2); run collector();
    if :: KILLS > 0 -> run killer() :: else fi
  }
}
