/*
 * The coordinator: a crash loses every local variable; the log stays. What it told stays told. A new
 * incarnation walks through the log again: every step it repeats is idempotent.
 */
#define ALL_PUBLISHED(v) (pub[0] == v && pub[1] == v)
#define ANY_PUBLISHED(v) (pub[0] == v || pub[1] == v)
#define REP_CLEAN(p) RANKS2(p, CLEAN)
#define ARMED_(r) (rv[r] == v)
#define VOTED_(r) (vote[r] == v)
#define READY_(r) (rdy[r] == v)
#define APPLIED_(r) (apd[r] == v)
#define ACTIVE_(r) (st[r] == ACTIVE && rv[r] == v)
#define PAST_(r) (rv[r] > v)
#define HELD_(s) (pub[s] != v || w[s] == v)
#define REP_ARMED(p) (!(set & BIT(p)) || RANKS2(p, ARMED_))
#define REP_VOTED(p) (!(set & BIT(p)) || RANKS2(p, VOTED_))
#define REP_ACTIVE(p) RANKS2(p, ACTIVE_)
#define REP_PAST(p) (PAST_(2 * p) || PAST_(2 * p + 1))
#define REP_GONE(p) RANKS2(p, GONE)
#define REP_OUT(p) (REP_GONE(p) || REP_PAST(p))
#define OUT_(r) ((st[r] == TORN && rv[r] >= v) || st[r] == DEAD)
/* After commit a replica has adopted v, or has heard that it is out; or it is already in a later version. */
#define REP_SETTLED(p) (REP_ACTIVE(p) || REP_PAST(p) || (tornv[p] >= v && RANKS2(p, OUT_)))
/* While its vote's generation lives and nothing was decided, a voter's target holds v, whole. */
#define VOTE_TRUE(r) (st[r] != PREPARED || rv[r] != v || stg[r] == WHOLE(r, v))
#define REP_TRUE(p) (!(set & BIT(p)) || RANKS2(p, VOTE_TRUE))

/* Without DEADLINES a deadline may pass at any moment: members that are merely slow are given up as
 * well. With DEADLINES=n that happens n times; members known to be lost are given up in any case. */
#define IS_LOST(r) (st[r] == DEAD || st[r] == REFUSED || st[r] == FAILED || (GONE(r) && rv[r] == v && st[r] != ACTIVE))
#define LOST(p) (IS_LOST(2 * p) || IS_LOST(2 * p + 1))
#define COUNTED_LOST(p) ((set & BIT(p)) && LOST(p))
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
#define GIVE_UP :: atomic { EXPIRED(SOME_REP(COUNTED_LOST)) -> EXPIRE(SOME_REP(COUNTED_LOST)); goto abort }

/* Insert or read: the record of v is written once, whoever comes first, and never overwritten. */
inline record(v, what, set) {
    CLAIM(I4_ALL_VOTED, what != COMMIT || log[v] != 0 || EVERY_REP(REP_VOTED));
    CLAIM(I8_PREPARED_STAYS_WHOLE, what != COMMIT || log[v] != 0 || EVERY_REP(REP_TRUE));
    CLAIM(I13_SOURCES_HOLD_STILL, log[v] != 0 || (HELD_(0) && HELD_(1)));
#ifdef LOG_OVERWRITE
    log[v] = what; counted[v] = set
#else
    if
    :: log[v] == 0 -> log[v] = what; counted[v] = set
    :: else
    fi
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

#if COORD_CRASHES > 0
#define COORD_DIES :: atomic { coord_crashes > 0 -> coord_crashes--; goto recover }
#else
#define COORD_DIES
#endif

#define FORGET(x) if :: x <= v -> x = 0 :: else fi

/* v is CLOSED: nobody compares with its messages any more. Forgetting them keeps the states few. */
inline forget(v) {
    d_step {
        for (i : 0 .. NSINK - 1) { FORGET(vote[i]); FORGET(rdy[i]); FORGET(apd[i]) }
        for (i : 0 .. NREP - 1) { FORGET(applyv[i]); FORGET(actv[i]); FORGET(tornv[i]) }
        for (i : 0 .. NSRC - 1) {
            if
            :: done[i] <= v -> done[i] = 0; source_digest[i] = 0
            :: else
            fi
        }
        if
        :: writev <= v -> writev = 0; writeset = 0
        :: else
        fi;
#ifdef SPARSE
        /* a rank that never saw Arm(v) knows by Decide(v) that it will not come */
        for (i : 0 .. NSINK - 1) {
            if
            :: rv[i] < v -> rv[i] = v
            :: else
            fi
        }
#endif
        i = 0
    }
}

/* All ranks ready: apply. All applied: activate. Not counted in the record, or too late: out. */
#define CLOSE_REP(p) \
    :: d_step { (counted[v] & BIT(p)) && RANKS2(p, READY_) && applyv[p] < v && tornv[p] < v -> applyv[p] = v } \
    :: d_step { (counted[v] & BIT(p)) && RANKS2(p, APPLIED_) && actv[p] < v && tornv[p] < v -> actv[p] = v } \
    :: d_step { dec[v] == COMMIT && !(counted[v] & BIT(p)) && tornv[p] < v && !REP_PAST(p) -> tornv[p] = v } \
    :: d_step { EXPIRED(LOST(p)) && dec[v] == COMMIT && !REP_ACTIVE(p) && !REP_PAST(p) && tornv[p] < v -> \
        EXPIRE(LOST(p)); tornv[p] = v }
/* Before the record a replica may be left out while another one remains. */
#define DROP_REP(p) \
    :: d_step { EXPIRED(LOST(p)) && (set & BIT(p)) && set != BIT(p) -> EXPIRE(LOST(p)); set = set & ~BIT(p); tornv[p] = v }

proctype Coordinator() {
    byte v = 1, i;
    byte set;                                           /* replicas counted in v */
    bit restarted;
next:
    atomic {
        set = 0;
        if
        :: v > NVER -> goto finished
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
    COORD_DIES
    od;
    /* OPEN: every replica whose ranks are clean is counted */
    atomic {
        set = (REP_CLEAN(0) -> 1 : 0);
#if NREP == 2
        set = set | (REP_CLEAN(1) -> 2 : 0);
#endif
        if
        :: set == 0 -> goto abort                       /* no quorum */
        :: else -> armset = set; armv = v
        fi
    };
    do
    :: EVERY_REP(REP_ARMED) -> break
    GIVE_UP
#if NREP == 2
    DROP_REP(0)
    DROP_REP(1)
#endif
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
#if NREP == 2
    DROP_REP(0)
    DROP_REP(1)
#endif
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
    atomic { tell(v, ABORT) };
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
close:                                                  /* DECIDED: every replica adopts or is out */
    do
    :: d_step { dec[v] == ABORT && EVERY_REP(REP_OUT) -> skip }; break
    :: d_step { dec[v] == COMMIT && EVERY_REP(REP_SETTLED) -> skip }; break
    CLOSE_REP(0)
#if NREP == 2
    CLOSE_REP(1)
#endif
    COORD_DIES
    od;
    atomic { forget(v); v++; goto next };
#if COORD_CRASHES > 0
recover:
    atomic {
        v = 1; set = 0; restarted = 1;
        if                                              /* Torn that nobody heard yet may be lost */
        :: tornv[0] = 0
#if NREP == 2
           ; tornv[1] = 0
#endif
        :: skip
        fi;
#ifdef COUNTED_NOT_RECORDED
        counted[1] = 3; counted[2] = 3;
#endif
        goto next
    };
#endif
finished:
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
