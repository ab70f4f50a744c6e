// Rates at which a kernel reads scattered rows of 512 bytes from host memory, by how it was allocated.
//
//     nvcc -O2 -arch=sm_90 -o bench_host_memory scripts/bench_host_memory.cu -lcuda
//     ./bench_host_memory HOW GIGABYTES...
//
// HOW is hostalloc (cudaHostAlloc), reg4k or regthp (mmap and cudaHostRegister, without and with
// transparent huge pages), hugetlb (MAP_HUGETLB; as root, it sets nr_hugepages) or vmm (cuMemCreate).
// Prints a JSON line for each order of reading: "random", or "lists": each program rising through a
// region of its own; with "layers", each call reads one part of the memory, the next call the next.
#include <cuda.h>
#include <cuda_runtime.h>
#include <sys/mman.h>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>
#define CK(x) do { auto e = (x); if (e != 0) { printf("FAILED %s: %d\n", #x, (int)e); fflush(stdout); return nullptr; } } while (0)
static double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
static void touch(char* p, size_t n) {
  std::vector<std::thread> ts;
  int k = 16;
  for (int i = 0; i < k; i++) ts.emplace_back([=] { size_t a = n / k * i, b = i == k - 1 ? n : n / k * (i + 1); for (size_t j = a; j < b; j += 4096) p[j] = 1; });
  for (auto& t : ts) t.join();
}
static void* allocate(const std::string& how, size_t n) {
  if (how == "hostalloc") { void* p; CK(cudaHostAlloc(&p, n, cudaHostAllocPortable)); return p; }
  if (how == "reg4k" || how == "regthp") {
    char* raw = (char*)mmap(nullptr, n + (2 << 20), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char* p = (char*)(((size_t)raw + (2 << 20) - 1) & ~((size_t)(2 << 20) - 1));
    int r = madvise(p, n, how == "regthp" ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    if (r) printf("madvise %d\n", r);
    touch(p, n);
    CK(cudaHostRegister(p, n, cudaHostRegisterPortable));
    return p;
  }
  if (how == "hugetlb") {
    char cmd[200]; snprintf(cmd, 200, "echo %zu > /proc/sys/vm/nr_hugepages; cat /proc/sys/vm/nr_hugepages", n / (2 << 20) + 16);
    if (system(cmd)) printf("no nr_hugepages\n");
    void* p = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
    if (p == MAP_FAILED) { printf("mmap hugetlb failed\n"); return nullptr; }
    touch((char*)p, n);
    CK(cudaHostRegister(p, n, cudaHostRegisterPortable));
    return p;
  }
  if (how == "vmm") {
    CUmemAllocationProp prop = {};
    prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    prop.location.type = CU_MEM_LOCATION_TYPE_HOST_NUMA;
    prop.location.id = 0;
    size_t g = 0;
    CK(cuMemGetAllocationGranularity(&g, &prop, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED));
    printf("granularity %zu\n", g);
    n = (n + g - 1) / g * g;
    CUmemGenericAllocationHandle h;
    CK(cuMemCreate(&h, n, &prop, 0));
    CUdeviceptr d;
    CK(cuMemAddressReserve(&d, n, 0, 0, 0));
    CK(cuMemMap(d, n, 0, h, 0));
    CUmemAccessDesc a[1] = {};
    a[0].location.type = CU_MEM_LOCATION_TYPE_DEVICE; a[0].location.id = 0; a[0].flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    CK(cuMemSetAccess(d, n, a, 1));
    return (void*)d;
  }
  return nullptr;
}
__global__ void rd(const uint4* base, const int* nums, int tiles, int tile, unsigned* out) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, nw = blockDim.x / 32;
  unsigned acc = 0;
#pragma unroll 1
  for (int t = 0; t < tiles; t++) {
    const int* mine = nums + ((size_t)t * gridDim.x + blockIdx.x) * tile;
#pragma unroll 4
    for (int r = warp; r < tile; r += nw) { uint4 v = base[(size_t)mine[r] * 32 + lane]; acc ^= v.x ^ v.w; }
    acc += __shfl_xor_sync(~0u, acc, 1);
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = acc;
}
int main(int argc, char** argv) {
  cudaFree(0);
  size_t free_, total; cudaMemGetInfo(&free_, &total);
  std::string how = argv[1];
  for (int g = 2; g < argc; g++) {
    double gb = atof(argv[g]);
    size_t n = (size_t)(gb * 1e9) / (64 << 20) * (64 << 20);
    double t0 = now();
    char* p = (char*)allocate(how, n);
    if (!p) return 1;
    double t1 = now();
    size_t rows = n / 512;
    struct Kind { const char* name; int layers, lists, programs, tile; };
    std::vector<Kind> kinds = {{"random", 1, 0, 64, 8}, {"lists", 1, 64, 64, 8}, {"lists", 1, 64, 64, 16}, {"lists", 1, 64, 128, 16}, {"lists", 1, 64, 256, 32}};
    if (gb > 10) { kinds.push_back({"lists", 12, 64, 64, 8}); kinds.push_back({"lists", 12, 64, 64, 16}); kinds.push_back({"lists", 12, 64, 256, 16}); }
    std::mt19937_64 rng(1);
    for (auto& k : kinds) {
      int per = 13000 / (k.programs * k.tile) * k.programs * k.tile, calls = 12;
      int tiles = per / (k.programs * k.tile);
      std::vector<int> nums((size_t)calls * per);
      for (int c = 0; c < calls; c++) {
        size_t span = rows / k.layers, first = span * (c % k.layers);
        int* o = &nums[(size_t)c * per];
        if (!k.lists) { for (int i = 0; i < per; i++) o[i] = first + rng() % span; continue; }
        // programs of the same list take turns in it
        int share = k.programs / k.lists, each = per / k.lists;
        size_t region = span / k.lists;
        for (int l = 0; l < k.lists; l++) {
          std::vector<int> m(each);
          for (auto& x : m) x = rng() % region;
          std::sort(m.begin(), m.end());
          for (int i = 0; i < each; i++) {
            int at = i % k.tile, chunk = i / k.tile, t = chunk / share, s = chunk % share;
            o[((size_t)t * k.programs + l * share + s) * k.tile + at] = first + region * l + m[i];
          }
        }
      }
      int* d; unsigned* out;
      cudaMalloc(&d, nums.size() * 4); cudaMalloc(&out, 4 << 20);
      cudaMemcpy(d, nums.data(), nums.size() * 4, cudaMemcpyHostToDevice);
      double best = 0, sum = 0;
      for (int rep = 0; rep < 4; rep++) {
        cudaEvent_t a, b; cudaEventCreate(&a); cudaEventCreate(&b);
        cudaEventRecord(a);
        for (int c = 0; c < calls; c++) rd<<<k.programs, k.tile >= 16 ? 128 : 64>>>((uint4*)p, d + (size_t)c * per, tiles, k.tile, out);
        cudaEventRecord(b); cudaEventSynchronize(b);
        float ms; cudaEventElapsedTime(&ms, a, b);
        double rate = (double)calls * per * 512 / ms / 1e6;
        if (rep) { best = std::max(best, rate); sum += rate / 3; }
      }
      printf("{\"how\":\"%s\",\"gb\":%.1f,\"order\":\"%s\",\"layers\":%d,\"programs\":%d,\"tile\":%d,\"gb_per_s\":%.1f,\"mean\":%.1f,\"alloc_s\":%.1f,\"err\":%d}\n", how.c_str(), gb, k.name, k.layers, k.programs, k.tile, best, sum, t1 - t0, (int)cudaGetLastError());
      fflush(stdout);
      cudaFree(d); cudaFree(out);
    }
    if (how == "regthp" || how == "reg4k") { if (system("grep -E 'AnonHuge|HugePages_T' /proc/meminfo")) {} }
    fflush(stdout);
    if (how == "hostalloc") cudaFreeHost(p);
    else if (g + 1 < argc) { if (how != "vmm") { cudaHostUnregister(p); munmap(p, n); } }
  }
}
