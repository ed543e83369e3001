/*
 * A rank that passes on (R15): rank 0 to rank NEXT (state.pml). Towards that rank it is a sender like a
 * source: it has its place in the arrays of senders, and the fabric and fences treat its writes alike.
 * Its fault is SINK_CRASHES: what a frozen one writes when it thaws is what it posted before, landing late.
 */
#ifdef NEXT
#define SOURCE_0 ((1 << NCH) - 1) /* the chunks that it passes on */

byte sent;                        /* the version whose bucket it has posted */
#ifdef WITNESS
byte hop_reports;                 /* versions that it reported */
#endif

/* ------------------------------------------------------------------ as the others see it */
/* Expect(v) waits for its report while the rank that gets something from it is counted; that rank needs
 * the report in any case. */
#ifdef FORWARDER_NOT_AWAITED
#define HOP_SAID(r) true
#define HOP_MATCHES(r) (rank_digest[r] != WRONG)
#else
#define HOP_REPORTED(r) (done[HOP] == rv[r] && ((r) != NEXT || (covers[HOP] & BIT(NEXT))))
#define HOP_SAID(r) (!HOP_PLANNED || HOP_REPORTED(r) || ((r) != NEXT && outv[REP(NEXT)] >= rv[r]))
#define HOP_MATCHES(r) (rank_digest[r] == source_digest[HOP])
#endif

/* Its vote waits for its own report: until then the fabric reads its memory. */
#ifdef FORWARDER_VOTES_EARLY
#define HAS_PASSED_ON(r) true
#else
#define HAS_PASSED_ON(r) ((r) != 0 || !HOP_PLANNED || done[HOP] == rv[r])
#endif

/* A rank compares what it was passed on with what the forwarder says it sent, not with the source's:
 * both may be wrong alike, and the forwarder's own check finds it. */
#define WRONG 4                   /* no digest of any sender */
#define CELLS_OF_0 ((1 << (2 * NCH)) - 1)
#if NCH == 2
#define PASSED_ON(r) ((stg[r] & 3) == ((stg[r] >> 2) & 3) -> stg[r] & 3 : MIXED)
#else
#define PASSED_ON(r) (stg[r] & 3)
#endif
#define HOP_DIGEST(r) (((stg[r] ^ WHOLE(r, rv[r])) & ~CELLS_OF_0) == 0 -> PASSED_ON(r) : WRONG)

/* Its replica cannot be left out while another one holds bytes that only its vote vouches for. */
#if defined(FORWARDER_LOST_IGNORED) || !defined(RELAY)
#define NEEDED(p) false
#elif defined(FORWARDER_TRUSTED)
#define NEEDED(p) ((p) == 0 && HOP_PLANNED && (set & 2) && done[HOP] != v)
#else
#define NEEDED(p) ((p) == 0 && HOP_PLANNED && (set & 2) && vote[0] != v)
#endif

/* ------------------------------------------------------------------ what it does */
/* The descriptors of this epoch, which it has connected to before Arm(v). */
inline bind_hop() { binding[HOP] = (HOP_PLANNED -> BIT(NEXT) : 0) }

inline forget_hop(u) {
    if
    :: sent <= u -> sent = 0; w[HOP] = 0
    :: else
    fi
}

#define RECEIVES (st[0] == FILLING || st[0] == DIGESTED)
#ifdef FORWARDS_EARLY
#define IS_THERE(v) (got[0] & SOURCE_0)
#else
#define IS_THERE(v) ((bits[PARITY(v)] & SOURCE_0) == SOURCE_0)
#endif
/* Write(v) says to whom: a rank that was left out before it was armed is not fenced. What there is to
 * pass on may arrive before this message does. */
#ifdef FORWARDS_UNTOLD
#define MAY_WRITE(v) true
#define WRITES_TO binding[HOP]
#else
#define MAY_WRITE(v) (writev == v)
#define WRITES_TO (binding[HOP] & writeset)
#endif
#ifdef FORWARDER_DONE_EARLY
#define IN_FLIGHT(v) 0
#else
#define IN_FLIGHT(v) FL(HOP, v)
#endif

proctype Forwarder() {
    byte i;
end_forwarder:
    do
    :: d_step {                                         /* its bucket is complete and visible */
        RECEIVES && HOP_PLANNED && sent != rv[0] && MAY_WRITE(rv[0]) && IS_THERE(rv[0]) ->
        sent = rv[0];
#ifndef FORWARDS_UNSEEN
        flush(0);
#endif
        w[HOP] = PASSED_ON(0);
        FL(HOP, sent) = ((WRITES_TO & BIT(NEXT)) -> RANK_WRITES(NEXT) : 0)
       }
    :: d_step {                                         /* WritesDone(v) */
        RECEIVES && sent == rv[0] && done[HOP] != sent && (IN_FLIGHT(sent) & ~DROPPED_WRITES(sent)) == 0 ->
        done[HOP] = sent;
        source_digest[HOP] = w[HOP];
        covers[HOP] = (IN_FLIGHT(sent) == 0 -> BIT(NEXT) : 0)
#ifdef WITNESS
        ; hop_reports++
#endif
       }
    od
}
#else
#define HOP_SAID(r) true
#define HAS_PASSED_ON(r) true
#define HOP_DIGEST(r) 0
#define HOP_MATCHES(r) false
#define NEEDED(p) false
inline bind_hop() { skip }
inline forget_hop(u) { skip }
#endif
