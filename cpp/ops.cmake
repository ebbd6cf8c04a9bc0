# The operators: one name per op in every list and file. To add one, add its files and its name here.
set(FASTLLM_OPS
    adamw
    bias_gelu
    cross_entropy
    glu
    grad_norm
    layernorm
    moe_permute
    rmsnorm
    rope
    softmax
)
# Without a CUDA kernel: torch and the libraries for GPUs have what these do.
set(FASTLLM_CPU_OPS
    attention
    matmul
)

set(FASTLLM_OP_BINDINGS bindings/cpu_isa.cpp bindings/dlpack_tensor.cpp)
set(_cpu_sources src/cpu/isa.cpp)
set(_cpu_kernels)
set(_cuda_sources src/cuda/launch.cpp)
foreach(op IN LISTS FASTLLM_OPS)
    list(APPEND FASTLLM_OP_BINDINGS bindings/${op}.cpp)
    list(APPEND _cpu_sources src/cpu/${op}.cpp)
    list(APPEND _cpu_kernels src/cpu/${op}_kernel.cpp)
    list(APPEND _cuda_sources src/cuda/${op}.cu)
endforeach()
foreach(op IN LISTS FASTLLM_CPU_OPS)
    list(APPEND FASTLLM_OP_BINDINGS bindings/${op}.cpp)
    list(APPEND _cpu_sources src/cpu/${op}.cpp)
    list(APPEND _cpu_kernels src/cpu/${op}_kernel.cpp)
endforeach()

# A library of its own, so that the emulator's module is these and nothing else.
add_library(fastllm_ops STATIC ${_cpu_sources})
target_include_directories(fastllm_ops PUBLIC include)
target_link_libraries(fastllm_ops PUBLIC fastllm_options)
target_compile_definitions(fastllm_ops PUBLIC FASTLLM_WITH_CUDA=${FASTLLM_WITH_CUDA})
fastllm_add_cpu_kernels(fastllm_ops ${_cpu_kernels})
fastllm_add_cuda_sources(fastllm_ops ${_cuda_sources})
