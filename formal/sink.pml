/*
 * A sink rank. Its replica is REP(r); it acts on messages only in the state that they fit.
 */
#ifdef DOUBLE_COUNT
#define COMPLETE(r) (((counts[(r) * 2 + PARITY(rv[r])] & 15) >= NCH) && ((counts[(r) * 2 + PARITY(rv[r])] >> 4) >= NCH))
#elif defined(DROPPED_TAIL)
#define COMPLETE(r) ((bits[(r) * 2 + PARITY(rv[r])] | BIT(NSRC * NCH - 1)) == CHUNKS(r))
#else
#define COMPLETE(r) (bits[(r) * 2 + PARITY(rv[r])] == CHUNKS(r))
#endif
#define EXPECTED(r) \
    (done[0] == rv[r] && done[1] == rv[r] && (covers[0] & BIT(r)) && (covers[1] & BIT(r)) && HOP_SAID(r))
#define DIGEST(r) (stg[r] == WHOLE(r, rv[r]) -> rv[r] : MIXED)
#define DIGESTS_MATCH(r) (rank_digest[r] == source_digest[0] && rank_digest[r] == source_digest[1])
#ifdef SPARSE
#define DIGEST_NOW(r) EXPECTED(r)                /* fewer orders: digest with the vote */
#else
#define DIGEST_NOW(r) true
#endif
#define TOLD_TO_APPLY(r) (st[r] == READY && applyv[REP(r)] == rv[r])
#if WITHDRAWS > 0
#define ASKED(r) (asked[r] != 0)
#else
#define ASKED(r) false
#endif
#define PAUSED(r) (!serve[r])

/* Content after a fence: staged memory is fresh; live bytes stay, and could be anything. */
#ifdef INPLACE
#define FRESH(r) CELLS(r)
#else
#define FRESH(r) 0
#endif

inline reset_slots(r) {
    bits[2 * r] = 0;
    bits[2 * r + 1] = 0;
#ifdef DOUBLE_COUNT
    counts[2 * r] = 0;
    counts[2 * r + 1] = 0;
#endif
    got[r] = 0
}

/* After it no byte of the old generation's writes changes this rank's memory. */
inline fence(r) {
#ifndef NO_FENCE
    void_generation(r);
    stg[r] = FRESH(r);
#endif
#if UNSEEN > 0
    unseen[r] = 0;
#endif
    rank_digest[r] = 0;
    reset_slots(r)
}

proctype Rank(byte r) {
    byte i;
end_rank:
    do
    :: d_step {                                         /* Arm(v): fill; in place, pause first */
        armv > rv[r] && (armset & BIT(REP(r))) && CLEAN(r) ->
        rv[r] = armv;
        exports = exports | BIT(r);
#ifdef INPLACE
#ifndef ARM_WITHOUT_PAUSE
        serve[r] = 0;
#endif
        lv[r] = MIXED;                                  /* the point of no return */
#endif
        st[r] = FILLING
       }
    :: d_step {                                         /* every bucket complete: flush, digest */
        st[r] == FILLING && COMPLETE(r) && DIGEST_NOW(r) ->
        flush(r);
        CLAIM(I7_COMPLETE_MEANS_ALL, got[r] == CHUNKS(r));
#if UNSEEN > 0
        CLAIM(I7_COMPLETE_MEANS_ALL, unseen[r] == 0);
#endif
#ifdef DIGEST_SKIPPED
        rank_digest[r] = rv[r];
#else
        rank_digest[r] = (HOP_FEEDS(r) -> HOP_DIGEST(r) : DIGEST(r));
#endif
        st[r] = DIGESTED
       }
    :: d_step {                                         /* Expect(v, digests): vote */
        st[r] == DIGESTED && EXPECTED(r) && HAS_PASSED_ON(r) ->
        if
        :: (HOP_FEEDS(r) -> HOP_MATCHES(r) : DIGESTS_MATCH(r)) -> st[r] = PREPARED; vote[r] = rv[r]
        :: else -> st[r] = REFUSED
        fi;
        rank_digest[r] = 0
       }
#ifdef APPLY_ALONE
    :: d_step {
        st[r] == PREPARED && dec[rv[r]] == COMMIT ->
        lv[r] = rv[r]; st[r] = APPLIED; rdy[r] = rv[r]; apd[r] = rv[r];
        check_serving(REP(r))
       }
#else
    :: d_step {                                         /* Decide(commit), then refit() is called */
        st[r] == PREPARED && dec[rv[r]] == COMMIT ->
        paused[r] = serve[r]; serve[r] = 0; st[r] = READY; rdy[r] = rv[r];
#if WITHDRAWS > 0
        asked[r] = 0                                    /* answers name their version */
#endif
       }
#endif
#if COORD_CRASHES > 0
    :: d_step { st[r] == READY && rdy[r] != rv[r] && !ASKED(r) -> rdy[r] = rv[r] }   /* again, on a new stream */
#endif
#if WITHDRAWS > 0
    :: d_step { r == 0 && st[r] == READY && withdraws > 0 -> withdraws--; asked[r] = 1 }
    :: d_step {                                         /* granted: back to the old version, still committed */
        asked[r] == 2 && st[r] == READY ->
        asked[r] = 0;
        serve[r] = serve[r] | paused[r];
        paused[r] = 0;
        st[r] = PREPARED;
        check_serving(REP(r))
       }
#endif
#ifdef READY_WITHDRAWN
    :: d_step { st[r] == READY && lv[r] != MIXED -> serve[r] = 1; st[r] = PREPARED; check_serving(REP(r)) }
#endif
    :: d_step {                                         /* Apply(v) */
        st[r] == READY && applyv[REP(r)] == rv[r] ->
        CLAIM(I9_REPLICA_FLIPS_AS_ONE, RANKS2(REP(r), PAUSED));
#if SINK_CRASHES > 0 || APPLY_FAILS > 0
        lv[r] = MIXED; paused[r] = 0; st[r] = APPLYING
       }
    :: d_step {
        st[r] == APPLYING ->
#endif
        CLAIM(I8_PREPARED_STAYS_WHOLE, stg[r] == WHOLE(r, rv[r]));
        lv[r] = rv[r]; paused[r] = 0; st[r] = APPLIED; apd[r] = rv[r]
       }
    :: d_step {
        st[r] == APPLYING && apply_fails > 0 ->
        apply_fails--; st[r] = FAILED;
#ifdef TORN_SERVES
        serve[r] = 1;
        check_serving(REP(r))
#endif
       }
    :: d_step {                                         /* Activate(v) */
#ifdef ACTIVATE_BY_NAME
        /* the planted bug: whoever now carries the rank's name obeys */
        (st[r] == APPLIED || st[r] == IDLE) && actv[REP(r)] == rv[r] && !serve[r] && rv[r] > 0 ->
#else
        st[r] == APPLIED && actv[REP(r)] == rv[r] ->
#endif
        serve[r] = 1; st[r] = ACTIVE;
        reset_slots(r);
#ifndef INPLACE
        stg[r] = 0;
#endif
        CLAIM(I3_VERSIONS_GROW, rv[r] >= highest[REP(r)]);
        highest[REP(r)] = rv[r];
        check_serving(REP(r))
       }
    :: d_step {                                         /* Decide(abort): fence before anything else */
        IN_USE(r) && dec[rv[r]] == ABORT ->
        fence(r);
#ifdef INPLACE
        st[r] = TORN;
#ifdef INPLACE_RESUMES
        st[r] = IDLE; serve[r] = 1;
#endif
#else
        st[r] = IDLE;
#endif
        check_serving(REP(r))
       }
    :: d_step {                                         /* Drop(v) of a version never armed here */
        GONE(r) && st[r] != DEAD && outv[REP(r)] > rv[r] ->
        rv[r] = outv[REP(r)];                           /* a late Arm of it is ignored */
        st[r] = (st[r] == ACTIVE -> IDLE : st[r])
       }
#ifndef INPLACE
    :: d_step {                                         /* Drop(v), no Apply before: the old version serves on */
        st[r] >= FILLING && st[r] <= READY && outv[REP(r)] == rv[r] && !TOLD_TO_APPLY(r) ->
#ifndef DROP_NOT_FENCED
        fence(r);
#endif
        serve[r] = serve[r] | paused[r];
        paused[r] = 0;
        st[r] = IDLE;
        check_serving(REP(r))
       }
#endif
    :: d_step {                                         /* Torn(v): Apply went out before */
#ifdef INPLACE
        (IN_USE(r) || st[r] == ACTIVE) && outv[REP(r)] == rv[r] ->
#else
        (st[r] >= APPLYING || TOLD_TO_APPLY(r) || st[r] == ACTIVE) && outv[REP(r)] == rv[r] ->
#endif
        serve[r] = 0; paused[r] = 0; lv[r] = MIXED;     /* whatever it is, it is not served again */
        fence(r);
        st[r] = TORN
       }
#if SINK_CRASHES > 0
    :: d_step {                                         /* faults strike one rank, in any state */
        r == VICTIM && sink_crashes > 0 && st[r] != DEAD ->
        sink_crashes--;
        serve[r] = 0; paused[r] = 0; st[r] = DEAD; stg[r] = 0; lv[r] = 0; rank_digest[r] = 0;
        void_generation(r);
        reset_slots(r)
       }
    :: d_step { st[r] == DEAD -> st[r] = IDLE; rv[r] = armv }   /* a new process, new generation */
    :: st[r] == DEAD -> break                                   /* or never again */
#endif
    od
}
