// Entry points of the library: kernels for each divergence, and their launch. No torch headers.

#include <cuda_runtime.h>

#include "row_kernel.h"

namespace {

template <int divergence, bool delta, bool leaves>
__global__ void __launch_bounds__(hero::MAX_THREADS, 1)
    cuda_divergence_rows_kernel(const __grid_constant__ RowsProblem problem,
                                const __grid_constant__ hero::Plan plan) {
    hero::divergence_rows<divergence, delta, leaves>(problem, plan);
}

using Kernel = void (*)(RowsProblem, hero::Plan);

template <bool delta>
Kernel kernel_for(const RowsProblem& problem, bool leaves) {
    switch (problem.divergence) {
        case hero::FORWARD_KL:
            return cuda_divergence_rows_kernel<hero::FORWARD_KL, delta, false>;
        case hero::REVERSE_KL:
            return cuda_divergence_rows_kernel<hero::REVERSE_KL, delta, false>;
        default:
            return leaves ? cuda_divergence_rows_kernel<hero::JSD, delta, true>
                          : cuda_divergence_rows_kernel<hero::JSD, delta, false>;
    }
}
Kernel kernel_for(const RowsProblem& problem, bool leaves) {
    return problem.delta ? kernel_for<true>(problem, leaves) : kernel_for<false>(problem, leaves);
}

// What a device and the code compiled for it offer. Makes the device current: this copy of the CUDA
// runtime need not know what torch's has made current.
cudaError_t get_limits(Kernel kernel, int device, hero::Limits* limits) {
    cudaFuncAttributes attributes;
    cudaError_t error = cudaSetDevice(device);
    if (!error)
        error = cudaDeviceGetAttribute(&limits->shared_per_block,
                                       cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (!error)
        error = cudaDeviceGetAttribute(&limits->shared_per_processor,
                                       cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    if (!error) error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
    if (error) return error;
    limits->max_cluster = attributes.ptxVersion >= 90 ? hero::MAX_CLUSTER : 1;
    return cudaSuccess;
}

// How many clusters run at once; 0 if the device cannot place one.
cudaError_t count_clusters(const void* kernel, int device, const hero::Plan& plan,
                           const hero::Limits& limits, cudaLaunchConfig_t* config, int* clusters) {
    // Always the most there is: another thread may launch the same kernel with another plan.
    cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_per_block);
    if (error) return error;
    if (plan.cluster_size == 1) {
        int processors = 0, blocks = 0;
        error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
        if (!error)
            error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
                &blocks, kernel, static_cast<int>(config->blockDim.x), plan.shared_bytes);
        *clusters = blocks * processors;
        return error;
    }
    if (plan.cluster_size > 8)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (!error) error = cudaOccupancyMaxActiveClusters(clusters, kernel, config);
    if (error) {  // a device that takes smaller clusters only: the caller halves them
        cudaGetLastError();
        *clusters = 0;
    }
    return cudaSuccess;
}

}  // namespace

extern "C" {

int hero_cuda_abi_version() {
    return HERO_ABI_VERSION;
}

const char* hero_cuda_error(int error) {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// Enqueues the kernel on `stream` of `device`; returns a cudaError_t. Nothing waits.
int hero_cuda_divergence_rows(const RowsProblem* problem, int device, void* stream) {
    hero::Limits limits;
    if (cudaError_t error = get_limits(kernel_for(*problem, false), device, &limits)) return error;
    for (;;) {
        hero::Plan plan = hero::choose_plan(*problem, limits);
        const Kernel typed = kernel_for(*problem, hero::leaves(*problem, plan));
        const void* kernel = reinterpret_cast<const void*>(typed);
        cudaLaunchAttribute attribute = {};
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = static_cast<unsigned>(plan.cluster_size);
        attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(static_cast<unsigned>(plan.cluster_size));
        config.blockDim = dim3(static_cast<unsigned>(32 * (plan.warps + 1)));
        config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
        config.stream = static_cast<cudaStream_t>(stream);
        config.attrs = &attribute;
        config.numAttrs = plan.cluster_size > 1;
        int clusters = 0;
        if (cudaError_t error = count_clusters(kernel, device, plan, limits, &config, &clusters))
            return error;
        if (clusters == 0) {
            // A partition of a GPU may be too small for a large cluster.
            if (plan.cluster_size == 1) return cudaErrorLaunchOutOfResources;
            limits.max_cluster = plan.cluster_size / 2;
            continue;
        }
        if (clusters > problem->rows) clusters = static_cast<int>(problem->rows);
        config.gridDim = dim3(static_cast<unsigned>(clusters * plan.cluster_size));
        RowsProblem arguments = *problem;
        void* pointers[] = {&arguments, &plan};
        return cudaLaunchKernelExC(&config, kernel, pointers);
    }
}
}
