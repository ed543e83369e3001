#include "state.pml"
#include "fabric.pml"
#include "source.pml"
#include "sink.pml"
#include "coordinator.pml"

#define AT_REST(r) (GONE(r) && (st[r] != TORN || !serve[r]))
#define DECIDED_IF_PUBLISHED(s, v) (pub[s] < v || dec[v] != 0)

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
#endif
#ifdef WITNESS
        assert(!(WITNESS))
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
        :: skip
        fi;
#endif
        run Fabric();
        run Source(0);
        run Source(1);
        for (r : 0 .. NSINK - 1) { run Rank(r) }
        r = 0;
        run Coordinator();
#if COORD_CRASHES > 0
        run ZombieCoordinator();
#endif
        run AtRest()
    }
}
