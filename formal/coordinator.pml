/*
 * The coordinator: a crash loses every local variable; the log stays. What it told stays told. A new
 * incarnation walks through the log again: every step it repeats is idempotent.
 */
#define ALL_PUBLISHED(v) (pub[0] == v && pub[1] == v)
#define ANY_PUBLISHED(v) (pub[0] == v || pub[1] == v)
#define REP_CLEAN(p) RANKS2(p, CLEAN)
#define REP_ALIVE(p) (st[2 * p] != DEAD && st[2 * p + 1] != DEAD)
#define HELD_(s) (pub[s] != v || w[s] == v)

/* of the version v that is open, among the replicas in `set` */
#define ARMED_(r) (rv[r] == v)
#define VOTED_(r) (vote[r] == v)
#define REP_ARMED(p) (!(set & BIT(p)) || RANKS2(p, ARMED_))
#define REP_VOTED(p) (!(set & BIT(p)) || RANKS2(p, VOTED_))
/* While its vote's generation lives and nothing was decided, a voter's target holds v, whole. */
#define VOTE_TRUE(r) (st[r] != PREPARED || rv[r] != v || stg[r] == WHOLE(r, v))
#define REP_TRUE(p) (!(set & BIT(p)) || RANKS2(p, VOTE_TRUE))
#define IS_LOST(r) (st[r] == DEAD || st[r] == REFUSED || (GONE(r) && rv[r] == v))
#define LOST(p) ((set & BIT(p)) && (IS_LOST(2 * p) || IS_LOST(2 * p + 1)))

/* of the version `adopting`, which is committed */
#define READY_(r) (rdy[r] == adopting || (rv[r] == adopting && (st[r] == APPLYING || st[r] == APPLIED)))
#define APPLIED_(r) (apd[r] == adopting)
#define ACTIVE_(r) (st[r] == ACTIVE && rv[r] == adopting)
#define PAST_(r) (rv[r] > adopting)
#define HOLDS_(r) (rv[r] == adopting && (st[r] == ACTIVE || (st[r] >= PREPARED && st[r] <= APPLIED)))
#define OUT_(r) (st[r] == DEAD || (GONE(r) && rv[r] >= adopting && !ACTIVE_(r)))
#define REP_ACTIVE(p) RANKS2(p, ACTIVE_)
#define BUSY_(r) (IN_USE(r) && rv[r] == adopting)
#define REP_PAST(p) (!BUSY_(2 * p) && !BUSY_(2 * p + 1) && (PAST_(2 * p) || PAST_(2 * p + 1)))
/* It has adopted, or every rank has heard that it is out; or it is already in a later version. */
#define REP_SETTLED(p) (REP_ACTIVE(p) || REP_PAST(p) || (outv[p] >= adopting && RANKS2(p, OUT_)))
#define REP_GONE(p) (RANKS2(p, GONE) || rv[2 * p] > v || rv[2 * p + 1] > v)

/* Without DEADLINES a deadline may pass at any moment: members that are merely slow are given up as
 * well. With DEADLINES=n that happens n times; members known to be lost are given up in any case. */
#ifdef NO_DEADLINE
#define EXPIRED(known) false
#define EXPIRE(known) skip
#elif defined(DEADLINES)
#define EXPIRED(known) (deadlines > 0 || known)
#define EXPIRE(known) if :: known :: else -> deadlines-- fi
#else
#define EXPIRED(known) true
#define EXPIRE(known) skip
#endif

/* Insert or read: the record of v is written once, whoever comes first, and never overwritten. */
inline record(v, what, set) {
    CLAIM(I4_ALL_VOTED, what != COMMIT || log[v] != 0 || EVERY_REP(REP_VOTED));
    CLAIM(I8_PREPARED_STAYS_WHOLE, what != COMMIT || log[v] != 0 || EVERY_REP(REP_TRUE));
    CLAIM(I13_SOURCES_HOLD_STILL, log[v] != 0 || (HELD_(0) && HELD_(1)));
#ifdef WITNESS
    counted = (v == 1 && what == COMMIT && log[v] == 0 -> set : counted);
#endif
#ifdef LOG_OVERWRITE
    log[v] = what
#else
    log[v] = (log[v] == 0 -> what : log[v])
#endif
}

inline tell(v, what) {
    dec[v] = what;
    told[v] = told[v] | what;
#if !defined(DECISION_NOT_DURABLE) && !defined(ABORT_NOT_RECORDED)    /* show what follows from it */
    CLAIM(I12_RECORDED_BEFORE_TOLD, log[v] == what);
#endif
    CLAIM(I5_ONE_DECISION, told[v] != (COMMIT | ABORT))
}

#define FORGET(x, u) if :: x <= u -> x = 0 :: else fi

/* u is CLOSED: nobody compares with its messages any more. Forgetting them keeps the states few. */
inline forget(u) {
    for (i : 0 .. NSINK - 1) { FORGET(vote[i], u); FORGET(rdy[i], u); FORGET(apd[i], u) }
    for (i : 0 .. NREP - 1) { FORGET(applyv[i], u); FORGET(actv[i], u); FORGET(outv[i], u) }
    for (i : 0 .. NSENDER - 1) {
        if
        :: done[i] <= u -> done[i] = 0; source_digest[i] = 0; covers[i] = 0
        :: else
        fi
    }
    forget_hop(u);
    if
    :: writev <= u -> writev = 0; writeset = 0
    :: else
    fi;
#ifdef SPARSE
    /* a rank that never saw Arm(u) knows by Decide(u) that it will not come */
    for (i : 0 .. NSINK - 1) {
        if
        :: rv[i] < u -> rv[i] = u; st[i] = (st[i] == ACTIVE -> IDLE : st[i])
        :: else
        fi
    }
#endif
    i = 0
}

#if COORD_CRASHES > 0
#define COORD_DIES :: atomic { coord_crashes > 0 -> coord_crashes--; goto recover }
#else
#define COORD_DIES
#endif

#define GIVE_UP :: atomic { EXPIRED(SOME_REP(LOST)) -> EXPIRE(SOME_REP(LOST)); goto abort }

/* Before the record a replica may be left out while another one remains. */
#if NREP == 2
#define DROP_REP(p) :: d_step { \
        EXPIRED(LOST(p)) && (set & BIT(p)) && set != BIT(p) && !NEEDED(p) -> \
        EXPIRE(LOST(p)); set = set & ~BIT(p); outv[p] = v }
#define DROP DROP_REP(0) DROP_REP(1)
#else
#define DROP
#endif

/* All ranks ready: apply. All applied: activate. One lost or too late: the replica is out. */
#define ADOPT_REP(p) \
    :: d_step { adopting && RANKS2(p, READY_) && applyv[p] < adopting && outv[p] < adopting -> applyv[p] = adopting } \
    :: d_step { adopting && RANKS2(p, APPLIED_) && actv[p] < adopting && outv[p] < adopting -> actv[p] = adopting } \
    :: d_step { adopting && EXPIRED(!RANKS2(p, HOLDS_)) && !REP_ACTIVE(p) && !REP_PAST(p) && outv[p] < adopting -> \
        EXPIRE(!RANKS2(p, HOLDS_)); outv[p] = adopting }
#if NREP == 2
#define ADOPT_ALL ADOPT_REP(0) ADOPT_REP(1)
#else
#define ADOPT_ALL ADOPT_REP(0)
#endif
#if WITHDRAWS > 0
#define GRANT :: d_step { \
        adopting && asked[0] == 1 && rdy[0] == adopting && applyv[0] < adopting && outv[0] < adopting -> \
        rdy[0] = 0; asked[0] = 2 }
#else
#define GRANT
#endif
#define ADOPT ADOPT_ALL GRANT :: d_step { adopting && EVERY_REP(REP_SETTLED) -> forget(adopting); adopting = 0 }

#ifdef OVERLAP
#define ADOPT_MEANWHILE ADOPT
#define MAY_COUNT(p) REP_ALIVE(p)
#else
#define ADOPT_MEANWHILE
#define MAY_COUNT(p) REP_CLEAN(p)
#endif

proctype Coordinator() {
    byte v = 1, i;
    byte set;                                           /* replicas counted in v */
    byte adopting;                                      /* committed version that replicas still adopt */
    bit restarted;
next:
    atomic {
        set = 0;
        if
        :: v > NVER -> goto last
        :: v <= NVER && log[v] != 0 -> goto tell_decision
        /* presumed abort, recorded before it is told: an older incarnation may be alive */
        :: v <= NVER && log[v] == 0 && restarted && ANY_PUBLISHED(v) -> goto abort
        :: else -> restarted = 0
        fi
    };
end_bind:
    do
    :: ALL_PUBLISHED(v) -> break
    :: atomic { EXPIRED(false) && ANY_PUBLISHED(v) && !ALL_PUBLISHED(v) -> EXPIRE(false); goto abort }
    ADOPT_MEANWHILE
    COORD_DIES
    od;
    /* OPEN */
    atomic {
        set = (MAY_COUNT(0) -> 1 : 0);
#if NREP == 2
        set = set | (MAY_COUNT(1) -> 2 : 0);
#endif
        if
        :: set == 0 -> goto abort                       /* no quorum */
        :: else -> armset = set; armv = v; bind_hop()
        fi
    };
    do
    :: EVERY_REP(REP_ARMED) -> break
    GIVE_UP
    DROP
    ADOPT_MEANWHILE
    COORD_DIES
    od;
    atomic { writev = v; writeset = RANKS_OF(set) };    /* WRITING */
    do
#ifdef COMMIT_BEFORE_VOTE
    :: done[0] == v && done[1] == v -> break
#else
    :: EVERY_REP(REP_VOTED) -> break
#endif
    GIVE_UP
    DROP
    COORD_DIES
    od;
    /* voted, not recorded */
#ifdef DECISION_NOT_DURABLE
    atomic { tell(v, COMMIT) };
#endif
    do
    :: d_step { true -> record(v, COMMIT, set) }; break
    COORD_DIES
#if COORD_CRASHES > 0
    :: atomic {                                         /* frozen here, replaced, thaws later */
        coord_crashes > 0 -> coord_crashes--;
        zombie_log_v = v; zombie_log_set = set;
        goto recover
       }
#endif
    od;
    goto tell_decision;
abort:
#ifdef ABORT_NOT_RECORDED
    atomic { tell(v, ABORT); set = 0 };
    goto close;
#else
    atomic { record(v, ABORT, 0) };
#endif
tell_decision:
    set = 0;
    do
    :: d_step { true -> tell(v, log[v]) }; break         /* recorded, now told */
    COORD_DIES
    od;
close:                                                  /* DECIDED */
    atomic {
        if
        :: dec[v] == COMMIT -> adopting = v
#ifdef ABORT_FORGETS_ADOPTION
        :: else -> adopting = 0
#else
        :: else
#endif
        fi
    };
    do
    /* aborted: every rank that was armed has fenced */
    :: atomic { dec[v] == ABORT && EVERY_REP(REP_GONE) -> break }
#ifdef OVERLAP
    :: atomic { dec[v] == ABORT && adopting -> break }   /* its ranks are not armed for v */
    :: atomic { dec[v] == COMMIT -> break }
#endif
    :: atomic { dec[v] == COMMIT && adopting == 0 -> break }
    ADOPT
    COORD_DIES
    od;
    atomic {
        if
        :: adopting == 0 -> forget(v)
        :: else
        fi;
        v++;
        goto next
    };
last:
    do
    :: adopting == 0 -> break
    ADOPT
    COORD_DIES
    od;
#if COORD_CRASHES > 0
    goto finished;
recover:
    atomic {
        v = 1; set = 0; restarted = 1; adopting = 0;
        /* The streams end: an Apply that no rank acted on is void; ranks say again where they stand.
         * A Drop that was on its way is lost, or arrives late: both are harmless. */
        for (i : 0 .. NSINK - 1) {
            rdy[i] = 0;
#if WITHDRAWS > 0
            asked[i] = 0;
#endif
            apd[i] = (st[i] == APPLIED || st[i] == ACTIVE -> apd[i] : 0)
        }
        i = 0;
        applyv[0] = 0;
#if NREP == 2
        applyv[1] = 0;
#endif
        if
        :: outv[0] = 0
#if NREP == 2
           ; outv[1] = 0
#endif
#ifndef SPARSE
        :: skip
#endif
        fi;
        goto next
    };
finished:
#endif
    skip
}

#if COORD_CRASHES > 0
/* An older incarnation that was frozen between the last vote and its record. It tells only what its
 * own insert put into the log. */
proctype ZombieCoordinator() {
    byte v, set;
end_zombie:
    do
    :: d_step {
        zombie_log_v != 0 ->
        v = zombie_log_v; set = zombie_log_set;
#ifdef WITNESS
        by_zombie = (log[v] == 0);
#endif
        record(v, COMMIT, set);
        if
        :: log[v] == COMMIT -> tell(v, COMMIT)
        :: else
        fi;
        v = 0; set = 0; zombie_log_v = 0; zombie_log_set = 0
       }
    od
}
#endif
