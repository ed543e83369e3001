/*
 * The fabric: reliable, unordered one-sided writes with an immediate. A write in flight lands at any
 * later time, in any order, perhaps twice; what it carries is read late, so it may be the weights as
 * they are when it lands. A fence (or the death of the sink process) voids what is in flight to the
 * old generation: it lands in an orphan. Local completion = no copy of the write is in flight.
 */

#ifdef FORWARDER_NOT_FENCED
#define NFENCED NSRC              /* the planted bug: only the sources' descriptors */
#else
#define NFENCED NSENDER
#endif

/* Void every write to rank r and every descriptor of its present generation. */
inline void_generation(r) {
    for (i : 0 .. NFENCED * NVER - 1) { fl[i] = fl[i] & ~RANK_WRITES(r) }
    for (i : 0 .. NFENCED - 1) { binding[i] = binding[i] & ~BIT(r) }
    zombie_binding = zombie_binding & ~BIT(r);
    exports = exports & ~BIT(r);
    i = 0
}

/* Post all writes of source s for version v through the descriptors in `ranks`. Writes that the
 * source has not reached yet are writes that land late, so one step loses no behaviour. */
inline post(s, v, ranks) {
    for (i : 0 .. NSINK - 1) {
        if
        :: (ranks & BIT(i)) && FED_BY(i, s) && !(s == 0 && HOP_FEEDS(i)) -> FL(s, v) = FL(s, v) | RANK_WRITES(i)
        :: else
        fi
    }
    i = 0
}

/* What has arrived is not visible before a flush. */
inline flush(r) {
#if UNSEEN > 0
#ifndef NO_FLUSH
    for (i : 0 .. NSRC * NCH - 1) {
        if
        :: unseen[r] & BIT(i) -> stg[r] = (stg[r] & ~(3 << (2 * i))) | (rv[r] << (2 * i))
        :: else
        fi
    }
    i = 0;
    unseen[r] = 0
#else
    skip
#endif
#else
    skip
#endif
}

/* Memory that waits for the fence of an aborted version is overwritten or refilled after it, and its
 * rank does not serve from it; landing later is always possible. Not exploring it is sound. */
#define LANDS(v, r) (log[v] != ABORT || rv[r] != v || GONE(r))

#define CHOOSE(s_, v_, r_, c_) :: (FL(s_, v_) & WRITE_BIT(r_, c_)) && LANDS(v_, r_) -> s = s_; v = v_; r = r_; c = c_
#if NCH == 2
#define CHOOSE_CHUNK(s_, v_, r_) CHOOSE(s_, v_, r_, 0) CHOOSE(s_, v_, r_, 1)
#else
#define CHOOSE_CHUNK(s_, v_, r_) CHOOSE(s_, v_, r_, 0)
#endif
#if NREP == 2
#define CHOOSE_RANK(s_, v_) \
    CHOOSE_CHUNK(s_, v_, 0) CHOOSE_CHUNK(s_, v_, 1) CHOOSE_CHUNK(s_, v_, 2) CHOOSE_CHUNK(s_, v_, 3)
#else
#define CHOOSE_RANK(s_, v_) CHOOSE_CHUNK(s_, v_, 0) CHOOSE_CHUNK(s_, v_, 1)
#endif
#ifdef NEXT
#define CHOOSE_HOP(v_) CHOOSE_CHUNK(HOP, v_, NEXT)
/* What a rank passes on is read when it posts or later, until the write has landed or it has hung up: it
 * does so before it fences, and before it reports without a target that was dropped. */
#define HUNG_UP(v) (done[HOP] == v && !(covers[HOP] & BIT(NEXT)))
#define STILL_READS(v) (IN_USE(0) && rv[0] == v && !HUNG_UP(v))
#define READ_LATE \
        :: s == HOP && STILL_READS(v) -> \
            CLAIM(I15_UNREAD_AFTER_VOTE, vote[0] != v); \
            x = (stg[0] >> (2 * c)) & 3
#else
#define CHOOSE_HOP(v_)
#define READ_LATE
#endif

proctype Fabric() {
    byte s, v, r, c, k, x, i;
end_fabric:
    do
    :: atomic {
        if
        CHOOSE_RANK(0, 1)
        CHOOSE_RANK(1, 1)
        CHOOSE_HOP(1)
#if NVER > 1
        CHOOSE_RANK(0, 2)
        CHOOSE_RANK(1, 2)
        CHOOSE_HOP(2)
#endif
        fi;
        if                                              /* the last copy, or one more is to come */
        :: FL(s, v) = FL(s, v) & ~WRITE_BIT(r, c)
        :: dups > 0 -> dups--
        fi;
        if
        :: s < NSRC -> x = v
        :: w[s] != v || s >= NSRC -> x = w[s]
        READ_LATE
        fi;
        if
        :: corrupt == 1 && s == 0 && v == 1 && r == 0 && c == 0 -> x = MIXED
        :: corrupt == 2 && s == NSRC && v == 1 && c == 0 -> x = MIXED
        :: else
        fi;
        k = (s % NSRC) * NCH + c;                       /* what is passed on is source 0's */
        /* I6: what still lands belongs to the version that the target is open for */
#if defined(NO_FENCE) || defined(EARLY_DONE) || defined(DROP_NOT_FENCED) || defined(DIGEST_FOR_ALL)
        CLAIM(I6_FENCED_WRITES_ARE_VOID, !IN_USE(r) || rv[r] == v);
#else
        CLAIM(I6_FENCED_WRITES_ARE_VOID, IN_USE(r) && rv[r] == v);
#endif
#ifdef INPLACE
        CLAIM(I11_LIVE_WEIGHTS_UNTOUCHED, !serve[r]);
#endif
        if
        :: stg[r] = (stg[r] & ~(3 << (2 * k))) | (x << (2 * k))
#if UNSEEN > 0
        :: hidden_left > 0 && x == v -> hidden_left--; unseen[r] = unseen[r] | BIT(k)
#endif
        fi;
        bits[r * 2 + PARITY(v)] = bits[r * 2 + PARITY(v)] | BIT(k);
#ifdef DOUBLE_COUNT
        counts[r * 2 + PARITY(v)] = counts[r * 2 + PARITY(v)] + (1 << (4 * (s % NSRC)));
#endif
        if
        :: IN_USE(r) && rv[r] == v -> got[r] = got[r] | BIT(k)
        :: else
        fi;
        s = 0; v = 0; r = 0; c = 0; k = 0; x = 0
       }
    :: atomic {                                         /* a frozen source thaws and writes on */
        zombie_v != 0 ->
        d_step { post(0, zombie_v, zombie_binding); zombie_v = 0; zombie_binding = 0 }
       }
    od
}
