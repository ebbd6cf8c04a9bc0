# Target `fastllm_options`: what every native target is compiled with.

# Ends the configuration as every fastllm command ends: what is wrong, and what to do about it.
function(fastllm_fail error hint)
    message(FATAL_ERROR "error: ${error}\nhint: ${hint}")
endfunction()

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
    set(CMAKE_BUILD_TYPE Release CACHE STRING "Build type" FORCE)
endif()
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)

add_library(fastllm_options INTERFACE)
target_compile_features(fastllm_options INTERFACE cxx_std_17)
set_target_properties(fastllm_options PROPERTIES INTERFACE_POSITION_INDEPENDENT_CODE ON)
set(_cxx "$<COMPILE_LANGUAGE:CXX>")
target_compile_options(fastllm_options INTERFACE "$<${_cxx}:-Wall;-Wextra;-Wshadow;-Wnon-virtual-dtor>")
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
    # GCC 12 misreads std::string's own copies (https://gcc.gnu.org/PR105329).
    target_compile_options(fastllm_options INTERFACE "$<${_cxx}:-Wno-restrict>")
endif()
if(FASTLLM_WERROR)
    target_compile_options(fastllm_options INTERFACE "$<${_cxx}:-Werror>")
endif()
if(FASTLLM_SANITIZE)
    target_compile_options(
        fastllm_options
        INTERFACE "$<${_cxx}:-fsanitize=address,undefined;-fno-sanitize-recover=all;-fno-omit-frame-pointer>"
    )
    target_link_options(fastllm_options INTERFACE -fsanitize=address,undefined)
endif()

set(THREADS_PREFER_PTHREAD_FLAG ON)
find_package(Threads REQUIRED)
target_link_libraries(fastllm_options INTERFACE Threads::Threads)
find_package(OpenMP COMPONENTS CXX)
if(OpenMP_CXX_FOUND)
    target_link_libraries(fastllm_options INTERFACE OpenMP::OpenMP_CXX)
    set(FASTLLM_WITH_OPENMP 1)
else()
    set(FASTLLM_WITH_OPENMP 0)
endif()
