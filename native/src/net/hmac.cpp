#include "hmac.hpp"

#include <dlfcn.h>

#include <string>
#include <vector>

#include <weightsync/error.hpp>
#include <weightsync/os.hpp>

namespace weightsync::net {

namespace {

// As <openssl/evp.h> and <openssl/hmac.h> declare them, in 1.1 and in 3.
using DigestFunction = const void* (*)();
using HmacFunction = unsigned char* (*)(const void* digest, const void* key, int key_nbytes,
                                        const unsigned char* data, std::size_t nbytes,
                                        unsigned char* mac, unsigned int* mac_nbytes);

struct Libcrypto {
    DigestFunction sha256 = nullptr;
    HmacFunction hmac = nullptr;
    const char* problem = nullptr;
};

Libcrypto load() {
    Libcrypto table;
    // Never closed: it registers handlers that run at exit.
    void* library = nullptr;
    for (const char* name : {"libcrypto.so.3", "libcrypto.so.1.1"}) {
        library = library == nullptr ? ::dlopen(name, RTLD_NOW | RTLD_LOCAL) : library;
    }
    if (library == nullptr) {
        table.problem =
            "no libcrypto.so.3 or libcrypto.so.1.1 on this system; install OpenSSL (libssl3)";
        return table;
    }
    table.sha256 = reinterpret_cast<DigestFunction>(::dlsym(library, "EVP_sha256"));
    table.hmac = reinterpret_cast<HmacFunction>(::dlsym(library, "HMAC"));
    if (table.sha256 == nullptr || table.hmac == nullptr) {
        table.problem = "the system's libcrypto lacks HMAC or EVP_sha256";
    }
    return table;
}

const Libcrypto& libcrypto() {
    static const Libcrypto table = load();
    return table;
}

}  // namespace

const char* libcrypto_problem() {
    return libcrypto().problem;
}

Mac hmac_sha256(const Key& key, std::initializer_list<std::span<const std::byte>> parts) {
    const Libcrypto& table = libcrypto();
    if (table.problem != nullptr) {
        throw Error(Scope::kConfig,
                    std::string("connections cannot be authenticated: ") + table.problem);
    }
    std::vector<std::byte> text;
    for (const auto part : parts) {
        text.insert(text.end(), part.begin(), part.end());
    }
    Mac mac{};
    unsigned int nbytes = 0;
    const auto* done = table.hmac(table.sha256(), key.data(), static_cast<int>(key.size()),
                                  reinterpret_cast<const unsigned char*>(text.data()), text.size(),
                                  reinterpret_cast<unsigned char*>(mac.data()), &nbytes);
    if (done == nullptr || nbytes != mac.size()) {
        throw Error(Scope::kInternal, "libcrypto could not make an HMAC");
    }
    return mac;
}

bool is_same(const Mac& a, const Mac& b) noexcept {
    unsigned difference = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
        difference |= std::to_integer<unsigned>(a[i] ^ b[i]);
    }
    return difference == 0;
}

Key make_key() {
    Key key{};
    fill_random(key);
    return key;
}

}  // namespace weightsync::net
