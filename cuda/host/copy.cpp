// A copy with non-temporal stores, its blocks spread over the pool (pool.cpp): how much memory moves when nothing is
// computed. `gpu-adam bench` compares the kernels with this copy.
//
// Non-temporal stores do not read the lines that they overwrite, so that a byte copied is two bytes moved.
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

extern "C" {

const long long COPY_BLOCK = 1 << 18;  // bytes of a block; mirrored by gpu_adam.bench.copy_bandwidth.BLOCK

#if defined(__AVX512F__)
typedef __m512i Wide;
static inline void stream(Wide* to, const Wide* from) { _mm512_stream_si512(to, _mm512_loadu_si512(from)); }
#elif defined(__AVX__)
typedef __m256i Wide;
static inline void stream(Wide* to, const Wide* from) { _mm256_stream_si256(to, _mm256_loadu_si256(from)); }
#elif defined(__x86_64__)
typedef __m128i Wide;
static inline void stream(Wide* to, const Wide* from) { _mm_stream_si128(to, _mm_loadu_si128(from)); }
#endif

// Arguments: target and source, addresses that are multiples of 64, and bytes, a multiple of 64.
void copy_entry(void** arguments, long long first, long long last, long long blocks, int block_size) {
    (void)blocks, (void)block_size;
    char* const target = *static_cast<char**>(arguments[0]);
    const char* const source = *static_cast<const char**>(arguments[1]);
    const long long bytes = *static_cast<const long long*>(arguments[2]);
    const long long begin = first * COPY_BLOCK;
    const long long end = last * COPY_BLOCK < bytes ? last * COPY_BLOCK : bytes;
#if defined(__x86_64__)
    for (long long i = begin; i < end; i += 64) {
        _mm_prefetch(source + i + 2048, _MM_HINT_T0);  // processors' own prefetchers stop at every 4 KB page
        for (long long k = i; k < i + 64; k += sizeof(Wide)) {
            stream(reinterpret_cast<Wide*>(target + k), reinterpret_cast<const Wide*>(source + k));
        }
    }
    _mm_sfence();
#else
    if (begin < end) memcpy(target + begin, source + begin, static_cast<size_t>(end - begin));
#endif
}
}
