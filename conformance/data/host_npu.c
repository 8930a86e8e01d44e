/* The functions of CANN that mean something when device memory is host memory, for stub libraries that torch_npu can
 * load. stubs.py adds the rest of what it is linked with, to fail when called. What it looks up by name while it runs and
 * is not here stays absent, which it can tell. stubs.py reads the names from lines that begin in the first column.
 * Signatures are from the public CANN documentation; arguments that no body needs are left out. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { OK = 0, FAILED = 500000 };

/* Calls for which doing nothing is right: there is nothing to wait for, switch or give back. */
#define NOTHING(name) int name(void) { return OK; }
/* Parts of an operator of the kind that came before aclnn: none can be had. */
#define NO_OBJECT(name) void *name(void) { return NULL; }

const char *ospnext_host_npu(void) { return "host NPU: vendor schemas, meta kernels and autograd on emulated arithmetic"; }

/* Whether the kernels are in place; before that, a call would end in an operator that is not found. */
static int ready = 0;

void ospnext_host_npu_ready(void) { ready = 1; }
int aclInit(const char *configuration) { (void)configuration; return ready ? OK : FAILED; }
const char *aclGetRecentErrMsg(void) {
  return ready ? "no message: this is a host NPU"
               : "host NPU: its kernels come with `import torch`, which has to stand before `import torch_npu`";
}

/* ---- the device */

static __thread int device = 0;

const char *aclrtGetSocName(void) {
  const char *name = getenv("HOST_NPU_SOC");
  return name && *name ? name : "Ascend950PR_9599";
}
/* ASCEND_RT_VISIBLE_DEVICES lists some of them in ascending order; what stands behind anything else is ignored. */
int aclrtGetDeviceCount(uint32_t *count) {
  const char *asked = getenv("HOST_NPU_COUNT"), *shown = getenv("ASCEND_RT_VISIBLE_DEVICES");
  const long all = asked && *asked ? atol(asked) : 8;
  *count = shown ? 0 : (uint32_t)all;
  for (long last = -1; shown && *shown >= '0' && *shown <= '9'; ++*count) {
    char *end;
    const long next = strtol(shown, &end, 10);
    if (next <= last || next >= all) break;
    last = next;
    shown = *end == ',' ? end + 1 : "";
  }
  return OK;
}
int aclrtSetDevice(int id) { device = id; return OK; }
int aclrtGetDevice(int *id) { *id = device; return OK; }
int aclrtGetLogicDevIdByUserDevId(int user, int *logic) { *logic = user; return OK; }
int aclrtGetPrimaryCtxState(int id, uint32_t *flags, int *active) {
  (void)id;
  if (flags) *flags = 0;
  if (active) *active = 1;
  return OK;
}
int aclrtGetCurrentContext(void **context) { *context = (void *)0x10; return OK; }
/* Numbers of cores and size of the cache: nothing here has them, and a program must not divide by 0. */
int aclGetDeviceCapability(uint32_t id, int what, int64_t *value) { (void)id; (void)what; *value = 1; return OK; }
int aclrtDeviceCanAccessPeer(int *can, int a, int b) { (void)a; (void)b; *can = 1; return OK; }
NOTHING(aclrtSetDeviceSatMode)
NOTHING(aclFinalize)
NOTHING(aclrtResetDevice)
NOTHING(aclrtSetCurrentContext)
NOTHING(aclrtDeviceEnablePeerAccess)
NOTHING(aclrtSynchronizeDevice)
NOTHING(aclrtSynchronizeDeviceWithTimeout)
int aclrtPeekAtLastError(int level) { (void)level; return OK; }
int aclrtGetLastError(int level) { (void)level; return OK; }

/* ---- memory */

static int allocate(void **pointer, size_t size) { return posix_memalign(pointer, 512, size ? size : 512) ? FAILED : OK; }

int aclrtMalloc(void **pointer, size_t size, int policy) { (void)policy; return allocate(pointer, size); }
int aclrtMallocAlign32(void **pointer, size_t size, int policy) { (void)policy; return allocate(pointer, size); }
int aclrtMallocHost(void **pointer, size_t size) { return allocate(pointer, size); }
int aclrtFree(void *pointer) { free(pointer); return OK; }
int aclrtFreeHost(void *pointer) { free(pointer); return OK; }
int aclrtGetMemInfo(int attribute, size_t *available, size_t *total) {
  (void)attribute;
  const size_t page = (size_t)sysconf(_SC_PAGESIZE);
  *available = (size_t)sysconf(_SC_AVPHYS_PAGES) * page;
  *total = (size_t)sysconf(_SC_PHYS_PAGES) * page;
  return OK;
}
int aclrtMemcpy(void *to, size_t room, const void *from, size_t size, int kind) {
  (void)room; (void)kind;
  memmove(to, from, size);
  return OK;
}
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size, int kind, void *stream) {
  (void)stream;
  return aclrtMemcpy(to, room, from, size, kind);
}
int aclrtMemset(void *to, size_t room, int value, size_t size) { (void)room; memset(to, value, size); return OK; }
int aclrtMemsetAsync(void *to, size_t room, int value, size_t size, void *stream) {
  (void)stream;
  return aclrtMemset(to, room, value, size);
}

/* ---- streams and events: every call is done when it returns */

static int handle(void **out) { return (*out = calloc(1, sizeof(struct timespec))) ? OK : FAILED; }

int aclrtCreateStream(void **stream) { return handle(stream); }
int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flag) {
  (void)priority; (void)flag;
  return handle(stream);
}
int aclrtStreamQuery(void *stream, int *status) { (void)stream; *status = 0; return OK; }
int aclrtStreamGetId(void *stream, int *id) { (void)stream; *id = 0; return OK; }
int aclrtGetStreamOverflowSwitch(void *stream, uint32_t *flag) { (void)stream; *flag = 0; return OK; }

int aclrtCreateEventWithFlag(void **event, uint32_t flag) { (void)flag; return handle(event); }
int aclrtCreateEventExWithFlag(void **event, uint32_t flag) { (void)flag; return handle(event); }
int aclrtRecordEvent(void *event, void *stream) {
  (void)stream;
  return clock_gettime(CLOCK_MONOTONIC, (struct timespec *)event) ? FAILED : OK;
}
int aclrtEventElapsedTime(float *milliseconds, void *start, void *end) {
  const struct timespec *a = start, *b = end;
  *milliseconds = (float)((double)(b->tv_sec - a->tv_sec) * 1e3 + (double)(b->tv_nsec - a->tv_nsec) / 1e6);
  return OK;
}
int aclrtQueryEventStatus(void *event, int *status) { (void)event; *status = 1; return OK; }
int aclrtQueryEventWaitStatus(void *event, int *status) { (void)event; *status = 1; return OK; }
int aclQueryEventRecordedStatus(void *event, int *status) { (void)event; *status = 1; return OK; }
int aclQueryEventWaitStatus(void *event, int *status) { (void)event; *status = 1; return OK; }

NOTHING(aclrtDestroyStream)
NOTHING(aclrtDestroyStreamForce)
NOTHING(aclrtDestroyEvent)
NOTHING(aclrtResetEvent)
NOTHING(aclrtStreamWaitEvent)
NOTHING(aclrtSynchronizeEvent)
NOTHING(aclrtSynchronizeStream)
NOTHING(aclrtSynchronizeStreamWithTimeout)
NOTHING(aclrtSetStreamFailureMode)
NOTHING(aclrtSetStreamOverflowSwitch)

/* ---- operators of the older kind, logs, profiles */

NO_OBJECT(aclCreateDataBuffer)
NO_OBJECT(aclCreateTensorDesc)
NO_OBJECT(aclopCreateAttr)
NOTHING(aclDestroyDataBuffer)
NOTHING(aclDestroyTensorDesc)
NOTHING(aclopDestroyAttr)
NOTHING(aclAppLog)
NOTHING(MsprofRegisterCallback)
NOTHING(MsprofReportApi)
NOTHING(MsprofReportCompactInfo)
NOTHING(MsprofReportAdditionalInfo)

/* ---- communication: nothing moves here; process_group.py moves the data once the vendor's group has let a call pass */

int HcclGetRootInfo(void *info) { memset(info, 0, 4108); return OK; }
int HcclCommInitRootInfo(uint32_t ranks, const void *info, uint32_t rank, void **comm) {
  (void)ranks; (void)info; (void)rank;
  return handle(comm);
}
int HcclCommInitRootInfoConfig(uint32_t ranks, const void *info, uint32_t rank, const void *config, void **comm) {
  (void)config;
  return HcclCommInitRootInfo(ranks, info, rank, comm);
}
int HcclGetCommName(void *comm, char *name) { (void)comm; strcpy(name, "host_npu"); return OK; }
int HcclGetCommAsyncError(void *comm, int *error) { (void)comm; *error = OK; return OK; }
NOTHING(HcclCommDestroy)
NOTHING(HcclAllReduce)
NOTHING(HcclBroadcast)
NOTHING(HcclReduce)
NOTHING(HcclScatter)
NOTHING(HcclAllGather)
NOTHING(HcclAllGatherV)
NOTHING(HcclReduceScatter)
NOTHING(HcclReduceScatterV)
NOTHING(HcclAlltoAll)
NOTHING(HcclAlltoAllV)
NOTHING(HcclAlltoAllVC)
NOTHING(HcclBatchSendRecv)
NOTHING(HcclSend)
NOTHING(HcclRecv)

/* ---- options */

NOTHING(aclSetCompileopt)
NOTHING(aclrtSetSysParamOpt)
NOTHING(aclrtCtxSetSysParamOpt)
NOTHING(aclrtSetOpExecuteTimeOut)
NOTHING(aclrtSetOpExecuteTimeOutV2)
NOTHING(aclrtSetOpWaitTimeout)

size_t aclGetCompileoptSize(int option) { (void)option; return 16; }
int aclGetCompileopt(int option, char *value, size_t size) {
  (void)option;
  memset(value, 0, size);
  strncpy(value, "disable", size - 1);
  return OK;
}
int aclrtGetSysParamOpt(int option, int64_t *value) { (void)option; *value = 0; return OK; }
int aclsysGetCANNVersion(int package, void *version) { (void)package; (void)version; return FAILED; }
