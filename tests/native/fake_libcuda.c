// A CUDA driver without a card: it loads "images" of text, launches nothing, and notes what it is asked for.
//
// An image is "FAKE TAG" and, for each kernel, " NAME,PARAMETERS,THREADS,CLUSTER"; like the real driver, it is told no
// length. A launch reads all the parameters that the kernel has, and is judged by what the kernel was compiled for.
// With FAKE_OLD_DRIVER it cannot tell how many there are, as drivers before CUDA 12.4.
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { kSuccess = 0, kInvalidValue = 1, kOutOfMemory = 2, kInvalidImage = 200, kNotFound = 500, kMaxKernels = 16 };

typedef struct {
  char name[64];
  long parameters;
  int threads, cluster, shared_limit;
  const char* tag;
} Kernel;

typedef struct {
  char tag[32];
  int num_kernels;
  Kernel kernels[kMaxKernels];
} Module;

long fake_loads = 0, fake_live_modules = 0, fake_launches = 0, fake_wild_pointers = 0, fake_bad_launches = 0;
int fake_memory_is_short = 0;
void* fake_context = (void*)0x1000;
char fake_last_tag[32] = "";

int cuCtxGetCurrent(void** context) { return *context = fake_context, kSuccess; }
int cuCtxGetDevice(int* device) { return *device = 0, kSuccess; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  *value = attribute == 16 ? 132 : attribute == 97 ? 232448 : 0;
  return *value ? kSuccess : kInvalidValue;
}

int cuModuleLoadData(void** handle, const void* image) {
  __atomic_add_fetch(&fake_loads, 1, __ATOMIC_SEQ_CST);
  if (fake_memory_is_short) return kOutOfMemory;
  const char* text = image;
  if (strlen(text) < 6 || strncmp(text, "FAKE ", 5) != 0) return kInvalidImage;
  Module* module = calloc(1, sizeof(Module));
  int used = 0;
  if (sscanf(text, "FAKE %31s%n", module->tag, &used) != 1) return free(module), kInvalidImage;
  text += used;
  for (; *(text += strspn(text, " ")) != 0; text += used) {
    Kernel* kernel = &module->kernels[module->num_kernels];
    if (module->num_kernels == kMaxKernels ||
        sscanf(text, "%63[a-zA-Z0-9_],%ld,%d,%d%n", kernel->name, &kernel->parameters, &kernel->threads,
               &kernel->cluster, &used) != 4) {
      return free(module), kInvalidImage;
    }
    kernel->tag = module->tag;
    ++module->num_kernels;
  }
  __atomic_add_fetch(&fake_live_modules, 1, __ATOMIC_SEQ_CST);
  *handle = module;
  return kSuccess;
}

int cuModuleUnload(void* module) {
  __atomic_sub_fetch(&fake_live_modules, 1, __ATOMIC_SEQ_CST);
  free(module);
  return kSuccess;
}

int cuModuleGetFunction(void** function, void* handle, const char* name) {
  Module* module = handle;
  for (int i = 0; i < module->num_kernels; ++i) {
    if (strcmp(module->kernels[i].name, name) == 0) return *function = &module->kernels[i], kSuccess;
  }
  return kNotFound;
}

int cuFuncSetAttribute(void* function, int attribute, int value) {
  if (attribute != 8) return attribute == 9 ? kSuccess : kInvalidValue;
  ((Kernel*)function)->shared_limit = value;
  return value > 232448 ? kInvalidValue : kSuccess;
}

int cuFuncGetAttribute(int* value, int attribute, void* function) {
  const Kernel* kernel = function;
  if (attribute != 0 && attribute != 11) return kInvalidValue;
  *value = attribute == 0 ? kernel->threads : kernel->cluster > 1 ? kernel->cluster : 0;
  return kSuccess;
}

#ifndef FAKE_OLD_DRIVER
int cuFuncGetParamInfo(void* function, size_t index, size_t* offset, size_t* size) {
  if (index >= (size_t)((Kernel*)function)->parameters) return kInvalidValue;
  *offset = 8 * index;
  *size = 8;
  return kSuccess;
}
#endif

int cuLaunchKernelEx(const unsigned* config, void* function, void** parameters, void** extra) {
  const Kernel* kernel = function;
  (void)extra;
  __atomic_add_fetch(&fake_launches, 1, __ATOMIC_SEQ_CST);
  // Grid, block and shared bytes are the first seven fields.
  const int as_compiled = config[0] > 0 && config[0] % kernel->cluster == 0 && config[3] == (unsigned)kernel->threads &&
                          config[6] <= (unsigned)kernel->shared_limit;
  if (!as_compiled) __atomic_add_fetch(&fake_bad_launches, 1, __ATOMIC_SEQ_CST);
  for (long i = 0; i < kernel->parameters; ++i) {
    const uintptr_t pointer = (uintptr_t)parameters[i];
    if (pointer < 4096 || pointer >> 47) {
      __atomic_add_fetch(&fake_wild_pointers, 1, __ATOMIC_SEQ_CST);
      return kSuccess;
    }
    (void)*(void* volatile*)pointer;
  }
  strcpy(fake_last_tag, kernel->tag);
  return kSuccess;
}

int cuGetErrorString(int result, const char** text) {
  *text = result == kOutOfMemory ? "out of memory" : "fake";
  return kSuccess;
}
