/*
 * A source: step the optimizer, publish, write when told, hold still until the decision is heard.
 */
#if NREP == 2
#define DROPPED_WRITES(v) ((outv[0] >= v -> REP_WRITES(0) : 0) | (outv[1] >= v -> REP_WRITES(1) : 0))
#else
#define DROPPED_WRITES(v) 0
#endif

#ifdef SOURCE_MUTATES
#define MUTATE :: d_step { w[s] == v -> w[s] = v + 1 }
#else
#define MUTATE
#endif
/* Decide(v, ...) */
#define NEXT_STEP :: atomic { dec[v] != 0 -> v++; goto step }

#if SRC_CRASHES > 0
/* Faults strike source 0: the sources are alike. It dies with its writes in flight, for good or
 * replaced by a new process that publishes from the next version on. */
#define SOURCE_DIES :: atomic { s == 0 && src_crashes > 0 -> src_crashes--; binding[s] = 0; goto dead }
/* Frozen between hearing Write and posting; declared dead and replaced; it thaws much later. */
#define SOURCE_FREEZES \
    :: atomic { s == 0 && src_crashes > 0 -> \
        src_crashes--; zombie_v = v; zombie_binding = binding[s]; binding[s] = 0; goto dead }
#else
#define SOURCE_DIES
#define SOURCE_FREEZES
#endif

proctype Source(byte s) {
    byte i, v = 1;
step:
    atomic {
        binding[s] = 0;
        w[s] = v;                                       /* the optimizer's step */
        if
        :: v > NVER -> goto finished
        :: else -> pub[s] = v                           /* Publish(v) */
        fi
    };
    do
    :: d_step {                                         /* Write(v), with the descriptors */
#ifdef WRITE_TO_ALL
        writev == v -> binding[s] = exports;
#else
        writev == v -> binding[s] = exports & writeset;
#endif
#if SRC_CRASHES == 0
        post(s, v, binding[s])                          /* nothing can come in between */
#endif
       }
#if SRC_CRASHES > 0
        do
        :: atomic { post(s, v, binding[s]); break }
        SOURCE_FREEZES
        od;
#endif
        do
        :: d_step {
#ifdef EARLY_DONE
            dec[v] == 0 ->
#else
            (FL(s, v) & ~DROPPED_WRITES(v)) == 0 && dec[v] == 0 ->
#endif
            source_digest[s] = w[s]; done[s] = v;
            covers[s] = 0;
            for (i : 0 .. NSINK - 1) {
                if
#if defined(DIGEST_FOR_ALL) || defined(EARLY_DONE)
                :: writeset & BIT(i) -> covers[s] = covers[s] | BIT(i)
#else
                :: (FL(s, v) & RANK_WRITES(i)) == 0 -> covers[s] = covers[s] | BIT(i)
#endif
                :: else
                fi
            }
            i = 0
           }
            do
            NEXT_STEP
            SOURCE_DIES
            MUTATE
            od
        NEXT_STEP
        SOURCE_DIES
        MUTATE
        od
    NEXT_STEP
    SOURCE_DIES
    MUTATE
    od;
#if SRC_CRASHES > 0
dead:
    if
    :: goto finished
    NEXT_STEP                                           /* the new process waits for a new version */
    fi;
#endif
finished:
    skip
}
