/* The CUDA kernels run on a CPU, to test their arithmetic and indexing. Each thread of a warp is a fiber, and fibers
   take turns at shuffles. Speed, races between warps and the vector atomics of Hopper cannot be tested this way. */
#include <ucontext.h>

#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 * 1024;

struct Index {
  unsigned x;
};
Index threadIdx, blockIdx;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done;
  unsigned shuffles;
};

Fiber fibers[kWarp];
ucontext_t scheduler;
int current;
// Two rows, because a fiber may publish its next value before the last fiber has read this one.
float published[2][kWarp];
const std::function<void()>* body;

void enter() {
  (*body)();
  fibers[current].done = true;
}

void run_warp(unsigned block, unsigned first_thread, const std::function<void()>& kernel) {
  body = &kernel;
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.stack.resize(kStack);
    fiber.context.uc_stack = {};
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    fiber.done = false;
    fiber.shuffles = 0;
    makecontext(&fiber.context, enter, 0);
  }
  for (bool alive = true; alive;) {
    alive = false;
    for (current = 0; current < kWarp; current++) {
      if (fibers[current].done) continue;
      blockIdx.x = block;
      threadIdx.x = first_thread + current;
      swapcontext(&scheduler, &fibers[current].context);
      alive = true;
    }
  }
}

float __shfl_xor_sync(unsigned, float value, int distance) {
  const int me = current;
  float* row = published[fibers[me].shuffles++ % 2];
  row[me] = value;
  swapcontext(&fibers[me].context, &scheduler);
  return row[me ^ distance];
}

void atomicAdd(float* to, float value) { *to += value; }

}  // namespace

#define __launch_bounds__(...)
#include "../cuda/ms_deform_attn.cuh"

namespace {

void run_grid(const msda::Problem& problem, int lanes, const std::function<void()>& kernel) {
  const int64_t rows = problem.B * problem.Q * problem.M;
  const unsigned blocks = static_cast<unsigned>((rows * lanes + msda::kThreads - 1) / msda::kThreads);
  for (unsigned block = 0; block < blocks; block++)
    for (unsigned thread = 0; thread < msda::kThreads; thread += kWarp) run_warp(block, thread, kernel);
}

msda::Problem make_problem(const int64_t* sizes, const int* spatial_shapes) {
  msda::Problem problem = {sizes[0], sizes[1],
                           sizes[2], sizes[3],
                           sizes[4], static_cast<int>(sizes[5]),
                           static_cast<int>(sizes[6])};
  int start = 0;
  for (int level = 0; level < problem.L; level++) {
    problem.height[level] = spatial_shapes[2 * level];
    problem.width[level] = spatial_shapes[2 * level + 1];
    problem.start[level] = start;
    start += problem.height[level] * problem.width[level];
  }
  return problem;
}

int lanes_for(int64_t packets) {
  int lanes = 1;
  while (lanes < packets && lanes < kWarp) lanes *= 2;
  return lanes;
}

template <typename T, int kVector>
void run(const msda::Problem& problem, const void* grad_output, const void* value, const float* locations,
         const float* weights, void* out, float* grad_value, float* grad_locations, float* grad_weights) {
  const int64_t packets = (problem.D + kVector - 1) / kVector;
  const int lanes = lanes_for(packets);
  const auto* v = static_cast<const T*>(value);
  const auto* g = static_cast<const T*>(grad_output);
  run_grid(problem, lanes, [&] {
    msda::forward_kernel<T, kVector>(problem, lanes, v, locations, weights, static_cast<T*>(out));
  });
  run_grid(problem, lanes, [&] {
    if (packets > lanes)
      msda::backward_kernel<T, kVector, true>(problem, lanes, g, v, locations, weights, grad_value, grad_locations,
                                              grad_weights);
    else
      msda::backward_kernel<T, kVector, false>(problem, lanes, g, v, locations, weights, grad_value, grad_locations,
                                               grad_weights);
  });
}

template <typename T>
void run_typed(bool vector, const msda::Problem& problem, const void* grad_output, const void* value,
               const float* locations, const float* weights, void* out, float* grad_value, float* grad_locations,
               float* grad_weights) {
  if (vector)
    run<T, 16 / sizeof(T)>(problem, grad_output, value, locations, weights, out, grad_value, grad_locations,
                           grad_weights);
  else
    run<T, 1>(problem, grad_output, value, locations, weights, out, grad_value, grad_locations, grad_weights);
}

}  // namespace

/* sizes: B, S, M, D, Q, L, K. dtype: 0 float32, 1 float16, 2 bfloat16. vector: 16-byte packets, or one channel each. */
extern "C" void msda_on_cpu(const int64_t* sizes, const int* spatial_shapes, int dtype, int vector,
                            const void* grad_output, const void* value, const float* locations, const float* weights,
                            void* out, float* grad_value, float* grad_locations, float* grad_weights) {
  const msda::Problem problem = make_problem(sizes, spatial_shapes);
  const auto function = dtype == 0 ? run_typed<float> : dtype == 1 ? run_typed<__half> : run_typed<__nv_bfloat16>;
  function(vector != 0, problem, grad_output, value, locations, weights, out, grad_value, grad_locations,
           grad_weights);
}
