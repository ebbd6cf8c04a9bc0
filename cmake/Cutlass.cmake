# FASTLLM_CUTLASS_SOURCE: the folder that holds CUTLASS's include/ and examples/, or empty, and its
# FASTLLM_CUTLASS_VERSION. Taken from CUTLASS_DIR (a checkout of https://github.com/NVIDIA/cutlass),
# else from the wheel nvidia-cutlass of the Python that is first on PATH.
set(CUTLASS_DIR "$ENV{CUTLASS_DIR}" CACHE PATH "CUTLASS: the folder with include/cutlass")
set(FASTLLM_CUTLASS_SOURCE "")
if(CUTLASS_DIR)
    if(NOT EXISTS "${CUTLASS_DIR}/include/cutlass/cutlass.h")
        fastllm_fail(
            "CUTLASS_DIR=${CUTLASS_DIR} has no include/cutlass/cutlass.h"
            "set it to a checkout of https://github.com/NVIDIA/cutlass, or leave it empty for the wheel nvidia-cutlass"
        )
    endif()
    set(FASTLLM_CUTLASS_SOURCE "${CUTLASS_DIR}")
else()
    find_program(FASTLLM_PYTHON python3)
    # -I: pip builds in an environment of its own, which hides what is installed from other Pythons.
    execute_process(
        COMMAND
            "${FASTLLM_PYTHON}" -I -c
            "import importlib.util as u; s = u.find_spec('cutlass_library'); print(s.submodule_search_locations[0] if s else '')"
        OUTPUT_VARIABLE _cutlass_library
        OUTPUT_STRIP_TRAILING_WHITESPACE
        ERROR_QUIET
    )
    set(_wheel "${_cutlass_library}/source")
    if(EXISTS "${_wheel}/include/cutlass/cutlass.h")
        set(FASTLLM_CUTLASS_SOURCE "${_wheel}")
    endif()
endif()
if(FASTLLM_CUTLASS_SOURCE)
    file(STRINGS "${FASTLLM_CUTLASS_SOURCE}/include/cutlass/version.h" _lines REGEX "^#define CUTLASS_(MAJOR|MINOR|PATCH) ")
    string(REGEX REPLACE "[^0-9;]" "" FASTLLM_CUTLASS_VERSION "${_lines}")
    string(REPLACE ";" "." FASTLLM_CUTLASS_VERSION "${FASTLLM_CUTLASS_VERSION}")
endif()
message(STATUS "fastllm: CUTLASS ${FASTLLM_CUTLASS_VERSION} ${FASTLLM_CUTLASS_SOURCE}")

# fastllm_add_gemm(<target>): the library of GEMMs, one instance a file; those in sm90 (CUTLASS 3.x,
# for sm_90a alone) in a library of their own. NDEBUG: a device assert would put a call into the
# kernels, which serialises their tensor instructions (ptxas C7510).
function(fastllm_add_gemm target)
    file(GLOB sources CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/src/cuda/gemm/*.cu")
    file(GLOB sm90 CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/src/cuda/gemm/sm90/*.cu")
    set(float16 1)
    if(NOT FASTLLM_CUTLASS_FP16)
        list(FILTER sources EXCLUDE REGEX "_fp16\\.cu$")
        list(FILTER sm90 EXCLUDE REGEX "_fp16\\.cu$")
        set(float16 0)
    endif()
    set(sm90_architecture 90a-real)
    if(FASTLLM_EMULATE_PTX)
        set(sm90_architecture 90a-virtual)
    endif()
    add_library(${target}_sm90 OBJECT EXCLUDE_FROM_ALL ${sm90})
    if(FASTLLM_EMULATE_PTX)
        # Without ptxas most of the time goes to what the instances share: all of a dtype together take
        # not much longer than two of them alone. (CMake 3.31; an older one compiles each alone.)
        set_target_properties(${target}_sm90 PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 5)
    endif()
    add_library(${target} STATIC EXCLUDE_FROM_ALL ${sources} $<TARGET_OBJECTS:${target}_sm90>)
    set_target_properties(${target}_sm90 PROPERTIES CUDA_ARCHITECTURES "${sm90_architecture}")
    foreach(library IN ITEMS ${target} ${target}_sm90)
        target_link_libraries(${library} PUBLIC fastllm_ops)
        target_include_directories(
            ${library} SYSTEM
            PRIVATE
                "${FASTLLM_CUTLASS_SOURCE}/include"
                "${FASTLLM_CUTLASS_SOURCE}/examples/45_dual_gemm"
                "${FASTLLM_CUTLASS_SOURCE}/examples"
        )
        target_compile_definitions(${library} PRIVATE NDEBUG)
        target_compile_definitions(${library} PUBLIC FASTLLM_GEMM_FP16=${float16})
        target_compile_options(${library} PRIVATE --expt-relaxed-constexpr)
    endforeach()
endfunction()
