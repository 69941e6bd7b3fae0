/* Segments that come and go under their readers: trim, publication into a new segment, mapping and unmapping.
 * Block 0 lies in the segment that an entry of the segment table names, and is published anew in the next one; block 1
 * lies in another segment, which stays. A peer process of two threads that share its mappings; a bit for each thread
 * stands for its use (threads.pml has the counting). The looks that decide nothing are left out, as in block.pml.
 */
#ifndef MUTANT
#define MUTANT 0
#endif
#ifndef WITNESS
#define WITNESS 0
#endif
#ifndef PUBLISHES
#define PUBLISHES 2              /* of block 0 */
#endif
#ifndef TRIMS
#define TRIMS 2
#endif
#ifndef LATE                     /* unannounced loads */
#define LATE 1
#endif
#ifndef WARM                     /* looks of the peer at the segment table that map what is live, without a hold */
#define WARM 0
#endif
#ifndef KILLS                    /* 1: the owner may be killed */
#define KILLS 0
#endif

#define OWNER    0
#define BIT(p)   (1 << (p))
#define IDS      4               /* 0: none */
/* a situation that the model must be able to reach: the run with -DWITNESS=k fails when it is met */
#define MET(k) assert(WITNESS != (k))

/* a property by the number of its rule, so that a failure names what it breaks; UNMAPPED: a trimmed segment is given up */
#define RULE(k, property) assert((k) > 0 && (property))
#define UNMAPPED 11

/* shared memory */
byte generation[2];              /* even: in use or free, odd: closing */
byte holds[2];
byte remaining[2];
byte segment_id;                 /* the entry of the segment table */
bool segment_live;
byte trim_count;
byte content[IDS];               /* by segment: the generation whose bytes lie in it */

bool data_name[IDS];             /* by segment */

/* of the peer process */
byte mapped;                     /* the segment it has mapped */
byte trims_seen;
bool map_lock;

/* what the rules promise; no decision of the protocol reads it */
typedef Message {
  byte gen;                      /* 0: not sent */
  byte to_come;
  byte due
}
Message message[PUBLISHES + 1];  /* the last is block 1's, from the start */
byte published;
byte late = LATE;
byte warm = WARM;
byte using[3];                   /* by thread: the segment it reads, from having the address to the release */
bool busy[3];
bool owner_ended;
bool killed;
bool finished;

#define CAS_GENERATION(from, to) \
  d_step { done = (generation[0] == (from)); if :: done -> generation[0] = (to) :: else fi }

/* leaves done: whether block 0 is the owner's, at generation g + 2 */
inline retire() {
  g = generation[0] - generation[0] % 2;
#if MUTANT == 1
  done = (holds[0] == 0);
  if :: done -> done = (remaining[0] == 0) :: else fi;
  if :: done -> CAS_GENERATION(g, g + 2) :: else fi;
#else
  generation[0] = g + 1;
  done = (holds[0] == 0);
  if :: done -> done = (remaining[0] == 0) :: else fi;
  if
  :: done -> CAS_GENERATION(g + 1, g + 2)
  :: else -> CAS_GENERATION(g + 1, g); done = false; MET(1)            /* a block that is trimmed is in use */
  fi;
#endif
  g = 0
}

inline add_segment() {
  segment = next; next++;
  data_name[segment] = true;
#if MUTANT == 6
  segment_id = segment;
  segment_live = true
#else
  segment_live = true;
  segment_id = segment
#endif
}

inline drop_segment() {
#if MUTANT == 5
  trim_count++;
  segment_live = false;
  segment_id = 0;
#else
  segment_live = false;
#if MUTANT != 4 && MUTANT != 6
  segment_id = 0;
#endif
  trim_count++;
#endif
  d_step {
    RULE(1, using[1] != segment && using[2] != segment);
    data_name[segment] = false
  };
  segment = 0;
  MET(2)                                                               /* a segment is trimmed */
}

proctype owner() {
  byte segment, next = 1, g, readers, trims;
  bool booked, done;

  {
    do
    :: published < PUBLISHES && !booked ->
       if :: segment == 0 -> add_segment() :: else fi;
       holds[0] = holds[0] | BIT(OWNER);
       booked = true;
       d_step { RULE(1, using[1] != segment && using[2] != segment); content[segment] = generation[0] };
       if :: readers = 1 :: readers = 0 fi;                            /* 0: unannounced */
       remaining[0] = readers;
       d_step {
         message[published].gen = generation[0];
         message[published].to_come = readers; message[published].due = readers;
         published++; readers = 0
       };
       holds[0] = holds[0] & ~BIT(OWNER)
    :: trims < TRIMS && booked ->
       trims++;
#if MUTANT == 10
       segment_id = 0; trim_count++;
#endif
#if MUTANT == 2
       done = (holds[0] == 0 && remaining[0] == 0);
#else
       retire();
#endif
       if
       :: done || MUTANT == 8 ->
          drop_segment();
          d_step { booked = false; done = false }
       :: else
#if MUTANT == 10
          -> segment_id = segment
#endif
       fi
    :: break
    od;
    owner_ended = true
  }
#if KILLS > 0
  unless { owner_ended }
#endif
}

#define PICK(k) \
  :: d_step { !finished && message[k].to_come > 0 -> message[k].to_come--; m = k; b = (k == PUBLISHES); busy[me] = true } \
  :: d_step { !finished && late > 0 && message[k].gen != 0 -> late--; m = k; b = (k == PUBLISHES); busy[me] = true }

inline unmap() {
  d_step { RULE(1, using[1] == 0 && using[2] == 0); mapped = 0 };
  MET(3)                                                               /* a peer gives a trimmed segment up */
}

inline drop_dead_mappings() {
  d_step { !map_lock -> map_lock = true };
#if MUTANT != 3
  trims_seen = trim_count;
#endif
  if
  :: mapped != 0 ->
#if MUTANT == 4
     if
     :: segment_id == mapped -> if :: segment_live :: else -> unmap() fi
     :: segment_id != mapped -> unmap()
     fi
#elif MUTANT == 6
     if
     :: segment_live -> if :: segment_id == mapped :: else -> unmap() fi
     :: !segment_live -> unmap()
     fi
#else
     if :: segment_id == mapped :: else -> unmap() fi
#endif
  :: else
  fi;
#if MUTANT == 3
  trims_seen = trim_count;
#endif
  map_lock = false
}

/* with map_lock; leaves ok: whether segment i has a name */
inline map_segment() {
  i = segment_id;
  d_step {
    ok = true;
    if
    :: i == mapped
    :: i != mapped && data_name[i] -> RULE(1, using[1] == 0 && using[2] == 0); mapped = i
    :: i != mapped && !data_name[i] -> ok = false
    fi
  }
}

inline read_generation() {
  d_step { seen = generation[b]; RULE(2, message[m].due == 0 || seen == message[m].gen || seen == message[m].gen + 1) }
}

proctype peer(byte me) {
  byte m, b, seen, i;
  bool ok;

  do
  :: if
     PICK(0)
     PICK(1)
     PICK(2)
#if PUBLISHES > 2
     PICK(3)
#endif
     fi;
     holds[b] = holds[b] | BIT(me);
     read_generation();
     do
     :: seen == message[m].gen -> ok = true; break
     :: seen == message[m].gen + 1 ->
        d_step {
          if :: generation[b] == seen -> seen--; generation[b] = seen :: else -> seen = generation[b] fi;
          RULE(2, message[m].due == 0 || seen == message[m].gen || seen == message[m].gen + 1)
        };
        MET(4)                                                         /* a load meets a block that is trimmed */
     :: else -> break
     od;
     seen = 0;
     if
     :: ok ->
        ok = false;
        d_step { if :: message[m].due > 0 -> message[m].due--; remaining[b]-- :: else fi };
        if :: trim_count != trims_seen -> drop_dead_mappings() :: else fi;
        if
        :: b == 0 ->
           d_step {
             if
             :: mapped != 0 && (mapped == segment_id || MUTANT == 9) -> i = mapped; using[me] = i
             :: else
             fi
           };
           if
           :: i == 0 ->
              d_step { !map_lock -> map_lock = true };
              map_segment();
              d_step { RULE(2, ok); ok = false; using[me] = i };       /* what is held has a name */
              map_lock = false
           :: else
           fi;
           d_step { RULE(3, content[i] == message[m].gen) };
           d_step { RULE(1, content[i] == message[m].gen && mapped == i); using[me] = 0; i = 0 }
        :: else
        fi;
        d_step { m = 0; holds[b] = holds[b] & ~BIT(me) }
     :: else ->
        MET(5);                                                        /* a load finds its handle stale */
        d_step { holds[b] = holds[b] & ~BIT(me); m = 0 }
     fi;
     d_step { b = 0; busy[me] = false }
  :: d_step { !finished && warm > 0 -> warm--; busy[me] = true };
     d_step { !map_lock -> map_lock = true };
     if
     :: segment_live && (segment_id != 0 || MUTANT == 7) ->
        map_segment();
        if
        :: ok || i == 0
        :: else ->
           MET(6);                                                     /* trimmed since it was seen */
#if MUTANT == 7
           RULE(UNMAPPED, false)
#else
           RULE(UNMAPPED, segment_id != i)                             /* or somebody else has removed the name */
#endif
        fi;
        d_step { i = 0; ok = false }
     :: else
     fi;
     map_lock = false;
     busy[me] = false
  :: finished -> break
  od
}

/* everything is consumed and released: the next call of the peer gives up what was trimmed, and a reaper finds all names */
proctype last() {
  byte i;

  skip;
  d_step {
    owner_ended && !busy[1] && !busy[2] &&
#if PUBLISHES > 2
    message[3].to_come == 0 &&
#endif
    message[0].to_come == 0 && message[1].to_come == 0 && message[2].to_come == 0 ->
    finished = true
  };
  if :: trim_count != trims_seen -> drop_dead_mappings() :: else fi;
  /* where the owner was killed the peer leaves the whole arena */
  RULE(UNMAPPED, killed || mapped == 0 || (data_name[mapped] && segment_live && segment_id == mapped));
#if MUTANT == 11
  if :: segment_live -> data_name[segment_id] = false :: else fi;
#else
  do
  :: i < IDS -> data_name[i] = false; i++
  :: else -> break
  od;
#endif
  RULE(7, !data_name[1] && !data_name[2] && !data_name[3])
}

proctype killer() {
  if
  :: d_step { !owner_ended && KILLS > 0 -> killed = true; owner_ended = true };
     if :: published > 0 && !segment_live && data_name[1] -> MET(7) :: else fi    /* while it trimmed */
  :: skip
  fi
}

init {
  atomic {
    generation[0] = 2; generation[1] = 2;
    message[PUBLISHES].gen = 2; message[PUBLISHES].to_come = 1; message[PUBLISHES].due = 1; remaining[1] = 1;
    run owner(); run peer(1); run peer(2); run last();
    if :: KILLS > 0 -> run killer() :: else fi
  }
}
