// What fi_shuffle_test sees of fake_fabric.
#pragma once

#include <deque>
#include <vector>

#include "fi_abi.hpp"

struct Posted {
    char call;  // w: write, d: writedata, m: writemsg
    std::uint64_t addr;
    std::size_t len;
    std::uint64_t data;
    std::uint64_t flags;
    void* context;
};

struct Fake {
    std::vector<Posted> posted;     // in the order in which they came
    std::deque<void*> completions;  // not read yet
    int num_busy = 0;               // so many posts are answered "try again"
    int num_reads = 0;
    void* refused = nullptr;  // the write of this context fails
    bool is_inner_untouched = false;
    // As `net` does: each write opens an endpoint of the same domain and binds it to this queue.
    fi::fid_cq* connects_by = nullptr;
    bool is_connection_untouched = false;
};

extern Fake fake;

extern "C" int fi_fabric(fi::fi_fabric_attr* attr, fi::fid_fabric** made, void* context);
