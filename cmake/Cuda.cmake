# FASTLLM_EMULATE_PTX: kernels are compiled by nvcc to PTX alone, which stays readable in the objects,
# and host code is linked to cpp/emulator, which executes it.
#
# Decides FASTLLM_WITH_CUDA (0 or 1) and FASTLLM_CUDA_ARCHITECTURES. AUTO never fails for want of nvcc.
#
# With FASTLLM_EMULATE the CUDA sources are compiled by the host compiler and linked to cpp/emulator in
# place of the CUDA runtime; that needs CUDA's headers, but neither nvcc nor a driver.
set(FASTLLM_WITH_CUDA 0)
set(FASTLLM_CUDA_VERSION "") # of the toolkit, e.g. 13.0.88
set(FASTLLM_CUDA_ARCHITECTURES "80;90" CACHE STRING "CUDA architectures to compile for")
if(NOT FASTLLM_CUDA MATCHES "^(AUTO|ON|OFF)$")
    fastllm_fail("FASTLLM_CUDA=${FASTLLM_CUDA} is none of its values" "AUTO, ON or OFF")
endif()

if(FASTLLM_EMULATE)
    if(NOT FASTLLM_CUDA STREQUAL "OFF")
        fastllm_fail("FASTLLM_EMULATE with FASTLLM_CUDA=${FASTLLM_CUDA}: a build has one CUDA backend" "FASTLLM_CUDA=OFF")
    endif()
    # A toolkit, or the wheel nvidia-cuda-runtime in the Python environment that is first on PATH.
    find_program(FASTLLM_NVCC nvcc)
    get_filename_component(_nvcc_dir "${FASTLLM_NVCC}" REALPATH)
    get_filename_component(_nvcc_dir "${_nvcc_dir}" DIRECTORY)
    find_program(FASTLLM_PYTHON python3)
    execute_process(
        COMMAND "${FASTLLM_PYTHON}" -c "import sysconfig; print(sysconfig.get_path('purelib'))"
        OUTPUT_VARIABLE _purelib
        OUTPUT_STRIP_TRAILING_WHITESPACE
    )
    find_path(
        FASTLLM_CUDA_INCLUDE cuda_bf16.h
        HINTS "${_nvcc_dir}/../include" "${_purelib}/nvidia/cu13/include"
        PATHS /usr/local/cuda/include
        DOC "Folder of cuda_runtime.h and cuda_bf16.h"
    )
    if(FASTLLM_CUDA_INCLUDE)
        set(FASTLLM_WITH_CUDA 1)
        set(FASTLLM_CUDA_ARCHITECTURES emulated)
    else()
        message(STATUS "fastllm: no CUDA headers, so the kernels are not emulated; set FASTLLM_CUDA_INCLUDE")
        set(FASTLLM_EMULATE OFF)
    endif()
elseif(NOT FASTLLM_CUDA STREQUAL "OFF")
    include(CheckLanguage)
    check_language(CUDA)
    if(CMAKE_CUDA_COMPILER)
        set(CMAKE_CUDA_ARCHITECTURES "${FASTLLM_CUDA_ARCHITECTURES}")
        if(FASTLLM_EMULATE_PTX)
            set(CMAKE_CUDA_ARCHITECTURES 80-virtual)
            set(CMAKE_CUDA_RUNTIME_LIBRARY None)
            string(APPEND CMAKE_CUDA_FLAGS " --no-compress")
        endif()
        set(CMAKE_CUDA_STANDARD 17)
        enable_language(CUDA)
        find_package(CUDAToolkit REQUIRED)
        set(FASTLLM_CUDA_INCLUDE "${CUDAToolkit_INCLUDE_DIRS}")
        list(GET FASTLLM_CUDA_INCLUDE 0 FASTLLM_CUDA_INCLUDE)
        set(FASTLLM_CUDA_VERSION "${CUDAToolkit_VERSION}")
        set(FASTLLM_WITH_CUDA 1)
    elseif(FASTLLM_CUDA STREQUAL "ON")
        fastllm_fail(
            "FASTLLM_CUDA=ON, but no CUDA compiler was found"
            "put nvcc on PATH, or set CUDACXX to it; FASTLLM_CUDA=AUTO builds without it"
        )
    endif()
endif()
message(STATUS "fastllm: CUDA ${FASTLLM_WITH_CUDA}, emulated ${FASTLLM_EMULATE}")

# What makes the host compiler call the emulator before every access of device code, and keeps it from
# joining neighbouring accesses, which nvcc does not join either.
set(
    FASTLLM_EMULATED_FLAGS
    -O2 -g1 -fsanitize=thread --param=tsan-instrument-func-entry-exit=0
    -fno-tree-vectorize -fno-tree-slp-vectorize -fno-store-merging -fno-tree-loop-distribute-patterns
    -Wno-shadow -Wno-unknown-pragmas
)

# fastllm_add_cuda_sources(<target> <source>...)
function(fastllm_add_cuda_sources target)
    if(NOT FASTLLM_WITH_CUDA)
        return()
    endif()
    if(NOT FASTLLM_EMULATE)
        target_sources(${target} PRIVATE ${ARGN})
        if(FASTLLM_EMULATE_PTX)
            target_link_libraries(${target} PUBLIC fastllm_ptx_emulator)
        else()
            target_link_libraries(${target} PUBLIC CUDA::cudart_static)
        endif()
        return()
    endif()
    set(kernels ${ARGN})
    list(FILTER kernels INCLUDE REGEX "\\.cu$")
    set(host ${ARGN})
    list(FILTER host EXCLUDE REGEX "\\.cu$")
    set_source_files_properties(${kernels} PROPERTIES LANGUAGE CXX)
    add_library(${target}_emulated OBJECT ${kernels})
    target_link_libraries(${target}_emulated PRIVATE fastllm_emulator)
    target_include_directories(${target}_emulated PRIVATE include)
    # CMake gives .cu files to a C++ compiler without -x c++, which would then be taken for objects.
    target_compile_options(${target}_emulated PRIVATE ${FASTLLM_EMULATED_FLAGS} -x c++)
    target_sources(${target} PRIVATE ${host} $<TARGET_OBJECTS:${target}_emulated>)
    target_link_libraries(${target} PUBLIC fastllm_emulator)
endfunction()
