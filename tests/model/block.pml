/* The life of one block: load, announce, release, retire and reuse, revoke, time-to-live, sweep, crash.
 * Every access to a shared word is a step of its own, as in csrc/block_state.hpp. A CAS loop that changes
 * one cell is a single step: only its last round has an effect, and that round is atomic. A kill frees the
 * slot's lock in the same step: a killed process does nothing more, so a later release of the lock adds nothing.
 */
#ifndef MUTANT
#define MUTANT 0
#endif
#ifndef WITNESS
#define WITNESS 0
#endif
#ifndef CELLS
#define CELLS 2
#endif
#ifndef GENERATIONS              /* how often the block is published */
#define GENERATIONS 2
#endif
#ifndef MESSAGES                 /* announcements begun, by the owner and by holders that forward */
#define MESSAGES 3
#endif
#ifndef READERS                  /* loads that one message of the owner may announce */
#define READERS 1
#endif
#ifndef LATE                     /* loads beyond the announced ones, of any message */
#define LATE 1
#endif
#ifndef RETIRES
#define RETIRES 2
#endif
#ifndef REVOKES
#define REVOKES 0
#endif
#ifndef EXPIRIES
#define EXPIRIES 0
#endif
#ifndef SWEEPS
#define SWEEPS 0
#endif
#ifndef KILLS
#define KILLS 0
#endif
#ifndef VICTIM
#define VICTIM 2
#endif

#define OWNER  0
#define SLOTS  3
#define BIT(p) (1 << (p))
#define NONE   255

/* a situation that the model must be able to reach: the run with -DWITNESS=k fails when it is met */
#define MET(k) assert(WITNESS != (k))

/* a property by the number of its rule, so that a failure names what it breaks; REUSE: a block comes back */
#define RULE(k, property) assert((k) > 0 && (property))
#define REUSE 10

/* shared memory */
byte generation = 2;             /* even: in use, odd: closing */
byte holds = BIT(OWNER);         /* one bit per peer */
byte remaining[CELLS];           /* a cell is free when it is 0 */
byte tag[CELLS];
#if EXPIRIES > 0
bool fresh[CELLS];               /* the message was announced after the time-to-live of the others had passed */
bool passed;
#endif
byte content = 2;                /* the generation whose bytes lie in the block */

/* kernel lock of a slot; it ends with its process */
#define FREE  0
#define PEER  1
#define SWEEP 2
byte slot[SLOTS];

/* messages in flight, and what the rules promise them; no decision of the protocol reads the promises */
typedef Message {
  byte gen;                      /* 0: not sent */
  byte cell;
  byte tag;
  byte to_come;                  /* announced loads that have not begun */
  byte due;                      /* announced loads that have not taken their ticket */
  bool withdrawn                 /* revoked or expired */
}
Message message[MESSAGES];
byte announced;
byte late = LATE;
bool using[SLOTS];               /* from a successful load to its release */
bool busy[SLOTS];
bool absent[SLOTS];              /* dead, and nobody takes the slot again */
byte kills;
byte dying = NONE;
bool finished;

/* cells whose ticket nobody will take: a message that was not sent or not loaded to its end, or, of an owner
   killed while it revoked, all messages of the block */
#if VICTIM == OWNER && REVOKES > 0
#define LOST (kills * CELLS)
#else
#define LOST kills
#endif

#define CURRENT(g, seen) ((seen) == (g) || (seen) == (g) + 1)
#define PROMISED(m)      (message[m].due > 0 && !message[m].withdrawn)
#define KEPT(m, seen)    (CURRENT(message[m].gen, seen) || !PROMISED(m))

inline drop_message(dropped) {
  d_step { if :: tag[c] == dropped -> remaining[c] = 0 :: else fi }
}

#if EXPIRIES > 0
#define STAMP fresh[c] = passed
#else
#define STAMP skip
#endif

/* by a holder of generation own; a is the message's index */
inline announce(own, readers) {
  if
  :: CURRENT(own, generation) ->
     do
     :: c < CELLS ->
#if MUTANT == 12
        if
        :: remaining[c] == 0 -> d_step { tag[c]++; mine = tag[c]; remaining[c] = readers; STAMP }; break
        :: else -> c++
        fi
#else
        if
        :: d_step { remaining[c] == 0 -> tag[c]++; mine = tag[c]; remaining[c] = readers; STAMP }; break
        :: else -> c++
        fi
#endif
     :: else -> break
     od;
     if
     :: c == CELLS ->
        MET(1);                                                        /* all cells taken: unannounced */
        d_step { message[a].cell = NONE; message[a].gen = own }
#if MUTANT != 10
     /* a revoke may have passed this cell before it was filled */
     :: c < CELLS && !CURRENT(own, generation) ->
        MET(2);
        drop_message(mine)
#endif
     :: c < CELLS && (CURRENT(own, generation) || MUTANT == 10) ->
        d_step {
          message[a].cell = c;
          message[a].tag = mine;
          message[a].to_come = readers;
          message[a].due = readers;
          message[a].withdrawn = !(CURRENT(own, generation) && tag[c] == mine && remaining[c] == readers);
          message[a].gen = own
        }
     fi
  :: else
  fi;
  a = 0; c = 0; mine = 0
}

inline read_generation() {
  d_step { seen = generation; RULE(2, KEPT(m, seen)) }
}

/* leaves ok: whether the peer now holds the block for message m */
inline load(me) {
#if MUTANT == 6
  read_generation();
  holds = holds | BIT(me);
#else
  holds = holds | BIT(me);
  read_generation();
#endif
  do
  :: seen == message[m].gen -> ok = true; break
  :: seen == message[m].gen + 1 ->
#if MUTANT == 4
     ok = true; break
#elif MUTANT == 5
     RULE(2, !PROMISED(m)); break
#else
     d_step {
       if
       :: generation == seen -> seen--; generation = seen
       :: else -> seen = generation
       fi;
       RULE(2, KEPT(m, seen))
     };
     MET(3)                                                            /* load meets a closing block */
#endif
  :: else -> break
  od;
  if
  :: ok ->
     c = message[m].cell;
#if MUTANT == 13
     if
     :: c != NONE ->
        d_step { seen = remaining[c]; mine = tag[c] };
        if
        :: mine == message[m].tag && seen > 0 ->
           d_step { remaining[c] = seen - 1; if :: message[m].due > 0 -> message[m].due-- :: else fi }
        :: else
        fi
     :: else
     fi;
#endif
     d_step {
       if
       :: MUTANT != 13 && c != NONE ->
          if
          :: remaining[c] > 0 && (tag[c] == message[m].tag || MUTANT == 7) ->
             RULE(2, message[m].due > 0 || message[m].withdrawn);      /* no ticket of another message */
             if :: message[m].due > 0 -> message[m].due-- :: else fi;
             remaining[c]--
          :: else ->
             if :: remaining[c] > 0 -> MET(8) :: else fi               /* the cell is another message's by now */
          fi
       :: else
       fi;
       RULE(3, content == message[m].gen);
       using[me] = true; c = 0; mine = 0; seen = 0
     }
  :: else ->
     MET(4);                                                           /* a load finds its handle stale */
     holds = holds & ~BIT(me);
     seen = 0
  fi
}

inline release(me) {
  d_step {
    RULE(1, !using[me] || content == message[m].gen);
    holds = holds & ~BIT(me);
    using[me] = false
  }
}

#define CAS_GENERATION(from, to) \
  d_step { done = (generation == (from)); if :: done -> generation = (to) :: else fi }

inline scan_holds() {
  if :: idle && holds != 0 -> idle = false :: else fi
}

inline scan_cells() {
  do
  :: idle && c < CELLS ->
     if :: remaining[c] != 0 -> idle = false :: else fi;
     c++
  :: else -> break
  od;
  c = 0
}

/* leaves done: whether the block is the caller's, at generation g + 2. The look at holds and cells that the
   code takes first is left out: it decides nothing, and without it more attempts reach the closing. */
inline retire() {
  g = generation - generation % 2;
  idle = true;
#if MUTANT == 2
  scan_holds(); scan_cells();
  if :: idle -> CAS_GENERATION(g, g + 2) :: else -> done = false fi;
#else
#if MUTANT == 3
  scan_holds();
#endif
  if
  :: d_step { generation == g -> generation = g + 1 }
  :: generation == g + 1 -> MET(5)                                     /* left closing by an owner that died */
  fi;
#if MUTANT == 1
  scan_cells(); scan_holds();
#elif MUTANT == 3
  scan_cells();
#else
  scan_holds(); scan_cells();
#endif
  if
  :: idle -> CAS_GENERATION(g + 1, g + 2)
  :: else -> CAS_GENERATION(g + 1, g); done = false
  fi;
#endif
  idle = false
}

inline drop_messages() {
  do
  :: c < CELLS -> n = tag[c]; drop_message(n); c++
  :: else -> break
  od;
  c = 0;
  n = 0
}

/* of whatever generation is in use, held by the owner or not */
inline bump_generation() {
  d_step {
    n = generation - generation % 2;
    generation = n + 2;
    do
    :: c < MESSAGES ->
       if :: message[c].gen == n -> message[c].withdrawn = true :: else fi;
       c++
    :: else -> break
    od;
    c = 0; n = 0
  }
}

/* waits for another sweep, which ends by itself; the code goes on without */
inline sweep(p) {
  if
#if MUTANT == 8
  :: slot[p] == FREE ->
     holds = holds & ~BIT(p)
#else
  :: d_step { slot[p] == FREE -> slot[p] = SWEEP };
     holds = holds & ~BIT(p);
     slot[p] = FREE
#endif
  :: slot[p] == PEER
  fi
}

proctype owner() {
  byte g = 2, a, c, mine, m, n, retires, revokes, expiries, published = 1;
  bool done, idle, held = true;

  slot[OWNER] = PEER;
alive:
  {
    do
    :: d_step { held && announced < MESSAGES -> a = announced; announced++ };
       if :: n = 1 :: READERS > 1 -> n = READERS fi;
       announce(g, n);
       n = 0
    :: held -> d_step { holds = holds & ~BIT(OWNER); held = false }
    :: !held && retires < RETIRES && published < GENERATIONS ->
       retires++;
       retire();
       if
       :: done ->
          holds = holds | BIT(OWNER);
          d_step {
            RULE(1, !using[1] && !using[2]);
            g = g + 2;
            content = g;
            published++; held = true; done = false
          }
       :: else
       fi
    :: revokes < REVOKES ->
       revokes++;
#if MUTANT == 9
       drop_messages(); bump_generation()
#else
       bump_generation(); drop_messages()
#endif
#if EXPIRIES > 0
    :: expiries < EXPIRIES ->
       expiries++;
       passed = true;
       do
       :: c < CELLS ->
#if MUTANT == 15
          idle = (remaining[c] > 0 && !fresh[c]);
          n = tag[c];
#else
          d_step { n = tag[c]; idle = (remaining[c] > 0 && !fresh[c]) };   /* one word */
#endif
          if
          :: idle ->
             d_step {
               if
               :: remaining[c] > 0 && (tag[c] == n || MUTANT == 14) ->
                  RULE(2, !fresh[c]);
                  remaining[c] = 0;
                  m = 0;
                  do
                  :: m < MESSAGES ->
                     if
                     :: message[m].gen != 0 && message[m].cell == c && message[m].tag == n -> message[m].withdrawn = true
                     :: else
                     fi;
                     m++
                  :: else -> break
                  od;
                  MET(9)                                               /* a message expires */
               :: else -> MET(10)                                      /* it was loaded, or its cell is another's */
               fi;
               m = 0; idle = false
             }
          :: else
          fi;
          n = 0; c++
       :: else -> break
       od;
       c = 0
#endif
    :: !held -> break
    od;

    skip;                        /* spin cannot leave a loop into a d_step */
    /* everything is consumed and released: the block must come back */
    d_step {
      dying == NONE && !busy[1] && !busy[2] && slot[1] == PEER && (slot[2] == PEER || slot[2] == FREE && absent[2]) &&
#if MESSAGES > 3
      message[3].to_come == 0 &&
#endif
#if MESSAGES > 2
      message[2].to_come == 0 &&
#endif
      message[1].to_come == 0 && message[0].to_come == 0 ->
      finished = true
    };
    sweep(2);
    d_step {
      RULE(6, holds == 0);
      do
      :: c < CELLS -> if :: remaining[c] > 0 -> n++; remaining[c] = 0 :: else fi; c++
      :: else -> break
      od;
      RULE(REUSE, n <= LOST);
      c = 0; n = 0
    };
    retire();
    RULE(REUSE, done);
    MET(6);
    if :: kills > 0 -> MET(7) :: else fi
  }
#if KILLS > 0 && VICTIM == OWNER
  unless {
    d_step {
      dying == OWNER;
      dying = NONE;
      g = 0; a = 0; c = 0; mine = 0; m = 0; n = 0; done = false; idle = false; held = false
    };
    slot[OWNER] = PEER;
    holds = holds & ~BIT(OWNER);
    goto alive
  }
#endif
}

#define PICK(k) \
  :: d_step { !finished && message[k].to_come > 0 -> message[k].to_come--; m = k; busy[me] = true } \
  :: d_step { !finished && late > 0 && message[k].gen != 0 -> late--; m = k; busy[me] = true }

proctype peer(byte me) {
  byte m, h, seen, a, c, mine;
  bool ok;

attach:
  {
    d_step { slot[me] == FREE -> slot[me] = PEER; busy[me] = true };
#if MUTANT != 11
    holds = holds & ~BIT(me);
#endif
    busy[me] = false;
    do
    :: if
       PICK(0)
       PICK(1)
#if MESSAGES > 2
       PICK(2)
#endif
#if MESSAGES > 3
       PICK(3)
#endif
       fi;
       load(me);
       if
       :: ok ->
          d_step { ok = false; h = message[m].gen };
          do
          :: d_step { announced < MESSAGES -> a = announced; announced++ };
             announce(h, 1)
          :: break
          od;
          release(me)
       :: else
       fi;
       d_step { m = 0; h = 0; busy[me] = false }
    :: finished -> break
    od
  }
#if KILLS > 0 && VICTIM != OWNER
  unless {
    d_step {
      dying == me;
      dying = NONE;
      m = 0; h = 0; seen = 0; a = 0; c = 0; mine = 0; ok = false
    };
    if :: goto attach :: absent[me] = true fi
  }
#endif
}

proctype sweeper() {
  byte sweeps;

  do
  :: sweeps < SWEEPS -> sweeps++; sweep(2)
  :: else -> break
  od
}

proctype killer() {
end:
  do
  :: d_step {
       kills < KILLS && !finished && dying == NONE && slot[VICTIM] == PEER ->
       kills++;
       dying = VICTIM;
       slot[VICTIM] = FREE; using[VICTIM] = false; busy[VICTIM] = false
     }
  od
}

init {
  atomic {
    run owner(); run peer(1); run peer(2);
    if :: SWEEPS > 0 -> run sweeper() :: else fi;
    if :: KILLS > 0 -> run killer() :: else fi
  }
}

#ifdef LTL
#define IS_CLOSING (generation % 2 == 1)
ltl opened_or_retired { [] (IS_CLOSING -> <> !IS_CLOSING) }
#endif
