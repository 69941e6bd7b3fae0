/* What becomes of an arena whose owner is gone: late loaders that join by name, collectors that come by (`shmx gc`, the
 * next arena made), time-to-live; and of a creation that was torn. One block with one message. Collectors or the
 * loader are killed at any step. arena.pml has the owner's own exit and peers that reap as they release.
 */
#ifndef MUTANT
#define MUTANT 0
#endif
#ifndef WITNESS
#define WITNESS 0
#endif
#ifndef CREATES                  /* 1: a creator makes the arena, and is killed at any step; 0: it is there, an orphan */
#define CREATES 0
#endif
#ifndef DEAD_PEER                /* 1: a peer has died with its bit set */
#define DEAD_PEER 1
#endif
#ifndef LOADERS
#define LOADERS 1
#endif
#ifndef KILLS                    /* of the first collector or the loader */
#define KILLS 0
#endif
#ifndef FOREVER                  /* 1: a third collector comes by again and again */
#define FOREVER 0
#endif

#define OWNER   0
#define LOADER  1
#define DEAD    2
#define FIRST   3                /* collectors */
#define SECOND  4
#define CREATOR 5
#define BIT(p)   (1 << (p))
#define FREE     0
#define TAKEN(p) ((p) + 1)
#define NONE     255

/* a situation that the model must be able to reach: the run with -DWITNESS=k fails when it is met */
#define MET(k) assert(WITNESS != (k))

/* a property by the number of its rule, so that a failure names what it breaks */
#define RULE(k, property) assert((k) > 0 && (property))

/* shared memory */
mtype = { open, closing, gone };
mtype lifecycle = open;
byte holds = BIT(OWNER) * !CREATES + BIT(DEAD) * DEAD_PEER * !CREATES;
byte remaining = !CREATES;
bool magic = !CREATES;           /* the header is complete */
bool control_name = !CREATES;
bool data_name = !CREATES;
byte lock[3];                    /* kernel locks by slot */

bool old;                        /* the message has outlived its time-to-live */

/* what the rules promise; no decision of the protocol reads it */
byte due = !CREATES;
bool given_up;                   /* the message was, after its time-to-live and with no live peer in sight */
bool joined;
bool kept[5];                    /* by collector: the loader has been a peer since before it took the owner lock */
bool using;
byte kills;
byte dying = NONE;
byte running;                    /* processes that will end by themselves */

inline sweep(me, p) {
  d_step { got = (lock[p] == FREE); if :: got -> lock[p] = TAKEN(me) :: else fi };
  if
  :: got -> holds = holds & ~BIT(p); lock[p] = FREE
  :: else
  fi;
  got = false
}

#define CAS_LIFECYCLE(from, to) \
  d_step { \
    got = (lifecycle == from); \
    if :: got -> lifecycle = to :: else fi; \
    RULE(1, lifecycle != gone || !using) \
  }

/* leaves idle */
inline scan() {
  idle = (holds == 0);
  if :: idle -> idle = (remaining == 0) :: else fi
}

/* with the owner lock; leaves idle: whether the arena is gone */
inline close_arena() {
  if
  :: lifecycle == gone -> idle = true; MET(4)                          /* a reaper died while it removed names */
  :: else ->
#if MUTANT == 1
     if :: lifecycle == closing -> idle = false :: else -> lifecycle = closing; idle = true fi;
     if :: idle ->
#else
     if :: lifecycle == closing -> MET(3) :: lifecycle == open -> CAS_LIFECYCLE(open, closing) fi;
#endif
     scan();
     if
     :: idle -> CAS_LIFECYCLE(closing, gone); idle = got
     :: else -> CAS_LIFECYCLE(closing, open)
     fi
#if MUTANT == 1
     :: else fi
#endif
  fi;
  got = false
}

/* by a collector, or (me == LOADER) by the loader as it releases, which spares itself and lets nothing expire */
inline reap(me) {
  do
  :: again ->
     again = false;
     d_step {
       got = (lock[OWNER] == FREE);
       if :: got -> lock[OWNER] = TAKEN(me); kept[me] = joined :: else fi
     };
     if
     :: got ->
        holds = holds & ~BIT(OWNER);
#if MUTANT != 2
        sweep(me, DEAD);
#endif
        if :: me != LOADER -> sweep(me, LOADER) :: else fi;
        if
        :: me != LOADER && (lock[LOADER] == FREE || MUTANT == 3) ->
           d_step {
             if
             :: (old || MUTANT == 4) && remaining > 0 ->
                RULE(2, !kept[me] && old);
                remaining = 0; given_up = true
             :: else
             fi
           }
        :: else
        fi;
        close_arena();
        if
        :: idle ->
#if MUTANT == 5
           control_name = false;
           data_name = false;
#else
           data_name = false;
           control_name = false;
#endif
           lock[OWNER] = FREE
        :: else ->
           lock[OWNER] = FREE;
           scan();
           again = idle
        fi
     :: else -> MET(1)                                                 /* another is at it, or the creator lives */
     fi;
     d_step { idle = false; got = false; kept[me] = false }
  :: else -> break
  od
}

/* of a control segment without a header */
inline reap_torn(me) {
  d_step { got = (lock[OWNER] == FREE); if :: got -> lock[OWNER] = TAKEN(me) :: else fi };
  if
  :: got ->
     got = false;
     if
     :: !magic || MUTANT == 6 ->
        RULE(2, due == 0);
        data_name = false; control_name = false;
        MET(2)                                                         /* a torn creation is removed */
     :: magic && MUTANT != 6
     fi;
     lock[OWNER] = FREE
  :: else
  fi;
  got = false
}

inline collect(me) {
  if
  :: control_name -> if :: magic -> again = true; reap(me) :: else -> reap_torn(me) fi
  :: else
  fi
}

proctype collector(byte me) {
  bool got, idle, again;

  {
    collect(me);
    running--
  }
#if KILLS > 0
  unless { dying == me }
#endif
}

proctype forever() {
  bool got, idle, again;

  do
  :: control_name -> collect(SECOND)
  :: !control_name && running == 0 -> break
  od
}

proctype loader() {
  mtype state;
  bool got, idle, again;

  {
    if
    :: control_name && magic ->
       /* the lock first, the name second: whoever removes it locks first, too */
       d_step { lock[LOADER] == FREE -> lock[LOADER] = TAKEN(LOADER) };
       if
       :: control_name ->
          d_step { joined = true };
          holds = holds & ~BIT(LOADER);
          holds = holds | BIT(LOADER);
          state = lifecycle;
          do
          :: state == closing ->
             d_step { if :: lifecycle == closing -> lifecycle = open; state = open :: else -> state = lifecycle fi };
             MET(5)                                                    /* a late load meets a closing arena */
          :: else -> break
          od;
          skip;
          if
          :: state == open ->
             d_step {
               RULE(1, lifecycle != gone);
               using = true;
               if :: remaining > 0 -> remaining--; due-- :: else fi
             };
             if :: given_up -> MET(6) :: else fi;                      /* it comes too late for its ticket, not for the bytes */
             d_step { RULE(1, lifecycle != gone && data_name); using = false };
          :: else -> d_step { RULE(2, due == 0 || given_up) }
          fi;
          holds = holds & ~BIT(LOADER);
          again = true;
          reap(LOADER);
          skip;                  /* spin cannot leave a loop into a d_step */
          d_step { joined = false; kept[FIRST] = false; kept[SECOND] = false };
       :: else -> d_step { RULE(2, due == 0 || given_up) }
       fi;
       lock[LOADER] = FREE
    :: !control_name && !CREATES -> d_step { RULE(2, due == 0 || given_up) }
    :: skip                                                            /* it never comes */
    fi;
    running--
  }
#if KILLS > 0
  unless { dying == LOADER }
#endif
}

proctype clock() {
  old = true
}

/* killed wherever it stops */
proctype creator() {
  bool made;

  control_name = true;
  if :: goto dead :: skip fi;
#if MUTANT == 7
  made = true;
#else
  d_step { made = (lock[OWNER] == FREE); if :: made -> lock[OWNER] = TAKEN(CREATOR) :: else fi };
#endif
  if
  :: made && (control_name || MUTANT == 8) ->
     if :: goto dead :: skip fi;
     holds = BIT(OWNER);
     magic = true;
     RULE(2, control_name);                                            /* from here on the arena is the creator's */
     data_name = true;
     if :: goto dead :: skip fi;
     d_step { RULE(2, control_name && data_name); remaining = 1; due = 1 };
     MET(7)
  :: else -> MET(8)                                                    /* it has met a reaper: another name */
  fi;
dead:
  skip;                          /* spin cannot jump to a d_step */
  d_step { if :: lock[OWNER] == TAKEN(CREATOR) -> lock[OWNER] = FREE :: else fi; running-- }
}

#define UNLOCK(p) \
  if :: lock[OWNER] == TAKEN(p) -> lock[OWNER] = FREE :: else fi; \
  if :: lock[LOADER] == TAKEN(p) -> lock[LOADER] = FREE :: else fi; \
  if :: lock[DEAD] == TAKEN(p) -> lock[DEAD] = FREE :: else fi

proctype killer() {
  if
  :: d_step { KILLS > 0 && running > 0 && lock[OWNER] == TAKEN(FIRST) -> dying = FIRST; kills++; running--; UNLOCK(FIRST) }
  :: d_step { KILLS > 0 && running > 0 && lock[LOADER] == TAKEN(LOADER) ->
       dying = LOADER; kills++; running--; joined = false; using = false; kept[FIRST] = false; kept[SECOND] = false;
       UNLOCK(LOADER) }
  :: skip
  fi
}

/* when nobody is left, one who comes by after the time-to-live removes everything */
proctype last() {
  bool got, idle, again;

  timeout;
  skip;
  collect(SECOND);
  RULE(7, !control_name && !data_name)
}

init {
  atomic {
    running = 2 - FOREVER + LOADERS + CREATES;
    run collector(FIRST); run clock();
    if :: LOADERS > 0 -> run loader() :: else fi;
    if :: CREATES > 0 -> run creator() :: else fi;
    if :: KILLS > 0 -> run killer() :: else fi;
    if :: FOREVER -> run forever() :: else -> run collector(SECOND); run last() fi
  }
}

#ifdef LTL
ltl removed { <> (!control_name && !data_name) }
#endif
