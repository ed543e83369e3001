/*
 * Constants, switches and the shared state of the model. Words are those of docs/protocol.md.
 *
 * Messages are variables that only grow (or are written once per version) and that the receiver
 * reads at some later step of its own. That is an at-least-once, arbitrarily delayed stream: a
 * receiver that never looks again has lost its connection, one that looks late was frozen.
 */

/* ------------------------------------------------------------------ size of the fleet */
#define NSRC 2                    /* sources */
#define NRANK 2                   /* sink ranks of one replica */
#ifndef NREP
#define NREP 1                    /* replicas, 1 or 2 */
#endif
#ifndef NCH
#define NCH 2                     /* chunks of one bucket; one bucket per (source, sink rank) */
#endif
#ifndef NVER
#define NVER 2                    /* versions; version 0 serves at the start */
#endif
#define NSINK (NREP * NRANK)

/* Who passes on (forwarder.pml): rank 0 sends its bucket of source 0 to one other rank, which source 0
 * then does not write to. NODE: to the other rank of its replica. RELAY: to the same rank of the other
 * replica, in versions that count both. */
#ifdef NODE
#define NEXT 1                    /* the rank that gets it */
#define HOP_PLANNED true
#elif defined(RELAY)
#define NEXT 2
#define HOP_PLANNED (armset == 3)
#endif
#ifdef NEXT
#define NSENDER (NSRC + 1)
#define HOP NSRC                  /* number of the forwarder as a sender: behind the sources */
#define HOP_FEEDS(r) ((r) == NEXT && HOP_PLANNED)
#else
#define NSENDER NSRC
#define HOP_FEEDS(r) false
#endif

/* ------------------------------------------------------------------ faults, each a budget per run */
#ifndef DUPS
#define DUPS 0                    /* writes that the fabric delivers a second time */
#endif
#ifndef CORRUPTS
#define CORRUPTS 0                /* a write that carries wrong bytes */
#endif
#ifndef UNSEEN
#define UNSEEN 0                  /* chunks that arrive (bit set) before their bytes are visible */
#endif
#ifndef SRC_CRASHES
#define SRC_CRASHES 0             /* a source dies, or is frozen, replaced, and thaws as a zombie */
#endif
#ifndef SINK_CRASHES
#define SINK_CRASHES 0            /* a sink rank dies in any state; it may come back as a new process */
#endif
#ifndef VICTIM
#define VICTIM 0                  /* which one: ranks are alike, but for those that pass on */
#endif
#ifndef APPLY_FAILS
#define APPLY_FAILS 0             /* apply fails on a rank that lives on */
#endif
#ifndef WITHDRAWS
#define WITHDRAWS 0               /* a refit that runs out of time before its replica is ready */
#endif
#ifndef COORD_CRASHES
#define COORD_CRASHES 0           /* the coordinator dies, or is frozen and replaced, in any state */
#endif
/* NO_DEADLINE: no deadline ever passes (only without faults: then every version must be adopted).
 * DEADLINES=n: at most n deadlines pass in a run. Not defined: any number.
 * SAME_PARITY: the two versions use the same slots (v and v + 2, or numbers chosen by the user).
 * OVERLAP: v + 1 may open while replicas still adopt v (one replica).
 * SPARSE: each rank is fed by one source instead of both.
 * INPLACE: bytes land in the live weights. Otherwise they are staged beside them. */
#ifdef SAME_PARITY
#define PARITY(v) 0
#else
#define PARITY(v) ((v) & 1)
#endif

/* ------------------------------------------------------------------ states and small sets */
#define COMMIT 1
#define ABORT 2

#define IDLE 0                    /* nothing open here */
#define ACTIVE 1                  /* adopted rv */
#define TORN 2                    /* out of traffic until a later version is adopted */
#define DEAD 3
#define FILLING 4
#define DIGESTED 5                /* FILLING, every bucket complete and its digest taken */
#define REFUSED 6                 /* FILLING, voted "failed" */
#define PREPARED 7
#define READY 8                   /* PREPARED, committed, serving paused, ReadyToApply sent */
#define APPLYING 9
#define APPLIED 10                /* APPLYING, Applied(ok) sent */
#define FAILED 11                 /* APPLYING, Applied(not ok) sent */

#define CLEAN(r) (st[r] < DEAD)   /* its staging may be opened for a new version */
#define GONE(r) (st[r] <= DEAD)
#define IN_USE(r) (st[r] > DEAD)

#define REP(r) ((r) / NRANK)
#define BIT(i) (1 << (i))
#define FL(s, v) fl[(s) * NVER + (v) - 1]
#define WRITE_BIT(r, c) (1 << ((r) * NCH + (c)))
#define RANK_WRITES(r) (((1 << NCH) - 1) << ((r) * NCH))
#define REP_WRITES(p) (((1 << (NCH * NRANK)) - 1) << ((p) * NCH * NRANK))
#define RANKS_OF(set) (((set) & 1 -> 3 : 0) | ((set) & 2 -> 12 : 0))
#ifdef SPARSE
#define FED_BY(r, s) ((r) % NRANK == (s))
#define CHUNKS(r) (((1 << NCH) - 1) << (((r) % NRANK) * NCH))
#define CELLS(r) (((1 << (2 * NCH)) - 1) << (2 * ((r) % NRANK) * NCH))
#else
#define FED_BY(r, s) true
#define CHUNKS(r) ((1 << (NSRC * NCH)) - 1)
#define CELLS(r) ((1 << (2 * NSRC * NCH)) - 1)
#endif
#define WHOLE(r, x) ((85 * (x)) & CELLS(r)) /* every chunk of rank r holds version x */
#define MIXED 3                   /* content that is no version */

#define RANKS2(p, X) (X(2 * (p)) && X(2 * (p) + 1))
#if NREP == 1
#define EVERY_REP(X) (X(0))
#define SOME_REP(X) (X(0))
#else
#define EVERY_REP(X) (X(0) && X(1))
#define SOME_REP(X) (X(0) || X(1))
#endif

/* ------------------------------------------------------------------ data plane */
byte fl[NSENDER * NVER];          /* writes in flight from sender s for version v: bit per (rank, chunk) */
byte stg[NSINK];                  /* memory of the target: two bits per chunk, the version it holds */
byte bits[NSINK * 2];             /* arrival bitmap of the slots of each parity */
#ifdef DOUBLE_COUNT
byte counts[NSINK * 2];           /* the planted bug: a counter per bucket, four bits each */
#endif
byte got[NSINK];                  /* ghost: chunks of rv that truly arrived */
#if UNSEEN > 0
byte unseen[NSINK];               /* chunks whose bit is set and whose bytes are not visible yet */
#endif
byte exports;                     /* ranks whose last descriptor names their present generation */
byte binding[NSENDER];            /* the same, as the sender holds it: a fence clears the rank's bit */

/* ------------------------------------------------------------------ senders: sources, then who passes on */
byte w[NSENDER];                  /* version of the weights in the sender's memory when it posts */
byte done[NSENDER];               /* WritesDone(v): every attempt locally complete */
byte source_digest[NSENDER];      /* what that message says the content is ... */
byte covers[NSENDER];             /* ... and for which ranks: those with no write left in flight */
byte pub[NSRC];                   /* Publish(v) */

/* ------------------------------------------------------------------ sink ranks */
byte st[NSINK];
byte rv[NSINK];                   /* the version st speaks about; Armed(v) is rv == v */
byte lv[NSINK];                   /* content of the live weights */
bit serve[NSINK];                 /* this rank computes tokens */
bit paused[NSINK];                /* it would, but waits in refit */
byte rank_digest[NSINK];          /* content seen by the digest */
byte vote[NSINK];                 /* Vote(v, prepared) */
byte rdy[NSINK];                  /* ReadyToApply(v) */
#if WITHDRAWS > 0
byte asked[NSINK];                /* 1: ReadyToApply(v, withdrawn), 2: granted */
#endif
byte apd[NSINK];                  /* Applied(v, ok) */
byte highest[NREP];               /* ghost: highest version the replica has served */

/* ------------------------------------------------------------------ coordinator */
byte log[NVER + 1];               /* durable: decision of v */
byte dec[NVER + 1];               /* Decide(v, ...) as told */
byte told[NVER + 1];              /* ghost: every decision ever told */
byte armv, armset;                /* Arm(v) and the replicas it goes to */
byte writev, writeset;            /* Write(v) and the ranks that it names */
byte applyv[NREP];                /* Apply(v) */
byte actv[NREP];                  /* Activate(v) */
byte outv[NREP];                  /* Drop(v) or Torn(v) to the ranks of a replica */

/* ------------------------------------------------------------------ zombies and budgets left */
byte zombie_v, zombie_binding;    /* a thawed source 0 that still has to post its writes */
byte zombie_log_v, zombie_log_set;/* a thawed coordinator that still has to record commit */
byte corrupt;                     /* 1: source 0 to rank 0, 2: what is passed on */
byte dups = DUPS;
byte hidden_left = UNSEEN;
byte src_crashes = SRC_CRASHES;
byte sink_crashes = SINK_CRASHES;
byte apply_fails = APPLY_FAILS;
#if WITHDRAWS > 0
byte withdraws = WITHDRAWS;
#endif
byte coord_crashes = COORD_CRASHES;
#ifdef DEADLINES
byte deadlines = DEADLINES;
#endif

/* ------------------------------------------------------------------ invariants, as in docs/protocol.md
 * Names that show in the message of pan when one fails; never assigned. */
bit I1_NO_MIXED_REPLICA = 1;
bit I2_ACTIVE_IS_COMMITTED = 1;
bit I3_VERSIONS_GROW = 1;
bit I4_ALL_VOTED = 1;
bit I5_ONE_DECISION = 1;
bit I6_FENCED_WRITES_ARE_VOID = 1;
bit I7_COMPLETE_MEANS_ALL = 1;
bit I8_PREPARED_STAYS_WHOLE = 1;
bit I9_REPLICA_FLIPS_AS_ONE = 1;
bit I10_TORN_IS_SILENT = 1;
bit I11_LIVE_WEIGHTS_UNTOUCHED = 1;
bit I12_RECORDED_BEFORE_TOLD = 1;
bit I13_SOURCES_HOLD_STILL = 1;
bit I14_NOTHING_STUCK = 1;
bit I15_UNREAD_AFTER_VOTE = 1;
#ifdef WITNESS
bit REACHED = 1;
bit by_zombie;
byte counted;                     /* replicas in the first commit */
#endif
#define CLAIM(name, condition) assert(!(name) || (condition))

#define SAME_CONTENT(a, b) (!(serve[a] && serve[b]) || lv[a] == lv[b])
#define SERVES_COMMITTED(r) (!serve[r] || (lv[r] != MIXED && (lv[r] == 0 || log[lv[r]] == COMMIT)))
#define SILENT(r) (!serve[r] || (st[r] != TORN && st[r] != FAILED && st[r] != DEAD))

inline check_serving(p) {
    CLAIM(I10_TORN_IS_SILENT, SILENT(2 * p) && SILENT(2 * p + 1));
    CLAIM(I1_NO_MIXED_REPLICA, SAME_CONTENT(2 * p, 2 * p + 1));
    CLAIM(I2_ACTIVE_IS_COMMITTED, SERVES_COMMITTED(2 * p) && SERVES_COMMITTED(2 * p + 1))
}
