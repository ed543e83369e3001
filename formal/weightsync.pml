/*
 * The versions protocol of docs/protocol.md: publish, arrival, vote, decision, apply, fence.
 *
 * Two sources, one coordinator, one or two replicas of two sink ranks, of which one may pass on what
 * it received, two versions. Faults are
 * budgets (state.pml), planted bugs are switches named in `formal/check`, which runs everything.
 * Claims carry the numbers of the invariants in docs/protocol.md.
 *
 * Every process takes its steps at any time or never: that is how slow, frozen and thawed members,
 * late messages and lost connections appear. Nothing waits on real time; a deadline is a step that
 * the coordinator may take whenever it waits.
 */
#include "state.pml"
#include "fabric.pml"
#include "source.pml"
#include "forwarder.pml"
#include "sink.pml"
#include "coordinator.pml"

#define AT_REST(r) (GONE(r) && (st[r] != TORN || !serve[r]))
#define DECIDED_IF_PUBLISHED(s, v) (pub[s] < v || dec[v] != 0)

/* Good ends that must be reachable, or the silence of the invariants proves nothing. */
#define ADOPTED(p) (serve[2 * (p)] && serve[2 * (p) + 1] && lv[2 * (p)] == NVER)
#if WITNESS == 1                  /* v1 aborted with a zombie or a dead source, v2 adopted */
#define GOAL (log[1] == ABORT && src_crashes == 0 && dups == 0 && ADOPTED(0))
#elif WITNESS == 2                /* both adopted although the coordinator was restarted */
#define GOAL (log[1] == COMMIT && log[2] == COMMIT && coord_crashes == 0 && ADOPTED(0))
#elif WITNESS == 3                /* a commit that only a coordinator thawed after its replacement recorded */
#define GOAL (by_zombie && ADOPTED(0))
#elif WITNESS == 4                /* a replica that was left out of v1 adopts v2 */
#define GOAL (log[1] == COMMIT && counted == 1 && ADOPTED(1))
#elif WITNESS == 5                /* v1 aborted without who passes on, v2 adopted with it */
#define GOAL (log[1] == ABORT && sink_crashes == 0 && dups == 0 && hop_reports == 2 && ADOPTED(0) && ADOPTED(NREP - 1))
#elif WITNESS == 6                /* who passed on was lost after its vote: the others adopt what it sent */
#define GOAL (log[1] == COMMIT && counted == 2 && hop_reports == 1 && ADOPTED(1))
#endif

/* I14: nothing can move any more. Then every version that anyone published is decided and heard of,
 * and no rank waits inside a version. */
proctype AtRest() {
    timeout ->
    d_step {
        CLAIM(I14_NOTHING_STUCK, DECIDED_IF_PUBLISHED(0, 1) && DECIDED_IF_PUBLISHED(1, 1));
#if NVER > 1
        CLAIM(I14_NOTHING_STUCK, DECIDED_IF_PUBLISHED(0, 2) && DECIDED_IF_PUBLISHED(1, 2));
#endif
        CLAIM(I14_NOTHING_STUCK, AT_REST(0) && AT_REST(1));
#if NREP == 2
        CLAIM(I14_NOTHING_STUCK, AT_REST(2) && AT_REST(3));
#endif
#ifdef NO_DEADLINE
        CLAIM(I14_NOTHING_STUCK, st[0] == ACTIVE && lv[0] == NVER && st[1] == ACTIVE && lv[1] == NVER);
#if NREP == 2
        CLAIM(I14_NOTHING_STUCK, st[2] == ACTIVE && lv[2] == NVER && st[3] == ACTIVE && lv[3] == NVER);
#endif
#endif
#ifdef WITNESS
        assert(!(REACHED && GOAL))
#endif
    }
}

init {
    byte r;
    atomic {
        for (r : 0 .. NSINK - 1) { serve[r] = 1 }
#if CORRUPTS > 0
        if
        :: corrupt = 1
#ifdef NEXT
        :: corrupt = 2
#endif
        :: skip
        fi;
#endif
        run Fabric();
        run Source(0);
        run Source(1);
        for (r : 0 .. NSINK - 1) { run Rank(r) }
        r = 0;
#ifdef NEXT
        run Forwarder();
#endif
        run Coordinator();
#if COORD_CRASHES > 0
        run ZombieCoordinator();
#endif
        run AtRest()
    }
}
