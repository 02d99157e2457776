// Launches kernels on the host. The kernels are part of this file, so that no linker drops them.

#include "all.cu"
#include "faulty.cu"

#include <csetjmp>
#include <memory>
#include <ucontext.h>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

constexpr size_t STACK = 64 << 10;
// Bytes behind the shared memory that nobody may write to.
constexpr size_t GUARD = 1024;
// What a launch gets on a GPU without asking for more.
constexpr unsigned SHARED_LIMIT = 48 << 10;

__thread host::Index threadIdx, blockIdx, blockDim, gridDim;

namespace host {

const Kernel* Kernel::first = nullptr;

// A flow of control: a thread of the block, or the one that runs them all.
struct Fiber {
    // Where it begins.
    ucontext_t context;
    bool entered = false;
    // Where it goes on.
    jmp_buf place;
    char* stack = nullptr;
    size_t stack_size = 0;
};

static void switch_between(Fiber& from, Fiber& to, bool for_good);
static void arrive(Fiber& from);

enum class Wait { None, Block, Warp, Ended };

struct Thread {
    Fiber fiber;
    Wait wait;
    // Shuffles so far: two that follow each other use different slots.
    unsigned shuffles;
};

struct Warp {
    uint32_t slots[2][32];
};

// A launch, of which one block is being run. A fiber is a thread of one block after the other.
class Launch {
  public:
    Launch(const Kernel& kernel, const Argument* arguments, unsigned block, size_t shared_bytes)
        : kernel(kernel), arguments(arguments), threads(block), warps(block / WARP),
          stacks(new char[block * STACK]), shared_bytes(shared_bytes),
          memory(new(std::align_val_t(16)) char[shared_bytes + GUARD]) {
        scheduler.entered = true;
        for (unsigned i = 0; i < block; i++) {
            prepare(threads[i].fiber, stacks.get() + i * STACK);
        }
    }
    ~Launch() { operator delete[](memory, std::align_val_t(16)); }
    Launch(const Launch&) = delete;
    Launch& operator=(const Launch&) = delete;

    // Runs block `blockIdx`; false after an error.
    bool run_block(bool backwards, bool last);
    void wait(Wait wait);
    void end();
    void fail(const char* what);
    uint32_t exchange(uint32_t bits, unsigned from);

    const Kernel& kernel;
    const Argument* const arguments;
    const char* error = nullptr;
    Fiber scheduler;

  private:
    static void prepare(Fiber& fiber, char* stack);
    void run_warp(unsigned warp, bool backwards);
    bool release();

    bool last_block = false;

    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::unique_ptr<char[]> stacks;
    size_t shared_bytes;

  public:
    char* const memory;
};

static thread_local Launch* launch = nullptr;

static void body() {
    arrive(launch->scheduler);
    for (;;) {
        launch->kernel(launch->arguments);
        launch->end();
    }
}

void Launch::prepare(Fiber& fiber, char* stack) {
    getcontext(&fiber.context);
    fiber.stack = stack;
    fiber.stack_size = STACK;
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, body, 0);
}

bool Launch::run_block(bool backwards, bool last) {
    last_block = last;
    memset(memory, 0xff, shared_bytes + GUARD);
    for (Thread& thread : threads) {
        thread.wait = Wait::None;
        thread.shuffles = 0;
    }
    const unsigned count = warps.size();
    do {
        for (unsigned i = 0; i < count && !error; i++) {
            run_warp(backwards ? count - 1 - i : i, backwards);
        }
    } while (!error && release());
    for (size_t i = 0; i < GUARD && !error; i++) {
        if (uint8_t(memory[shared_bytes + i]) != 0xff) {
            fail("wrote behind its shared memory");
        }
    }
    return !error;
}

// Runs a warp as far as it gets without the others.
void Launch::run_warp(unsigned warp, bool backwards) {
    const unsigned first = warp * WARP;
    unsigned waiting;
    do {
        waiting = 0;
        for (unsigned i = 0; i < WARP && !error; i++) {
            threadIdx = {first + (backwards ? WARP - 1 - i : i), 0, 0};
            Thread& thread = threads[threadIdx.x];
            if (thread.wait == Wait::None) {
                switch_between(scheduler, thread.fiber, false);
            }
            waiting += thread.wait == Wait::Warp;
        }
        for (unsigned i = 0; i < WARP && waiting == WARP; i++) {
            threads[first + i].wait = Wait::None;
        }
    } while (waiting == WARP && !error);
    if (waiting > 0) {
        fail("lanes of a warp wait for lanes that wait elsewhere or have ended");
    }
}

// The thread is not run again in this block; after an error, nor in any other.
void Launch::end() {
    Thread& thread = threads[threadIdx.x];
    thread.wait = Wait::Ended;
    switch_between(thread.fiber, scheduler, last_block || error);
}

// Lets the threads go on if all wait for each other; false if all have ended.
bool Launch::release() {
    size_t blocked = 0, ended = 0;
    for (const Thread& thread : threads) {
        blocked += thread.wait == Wait::Block;
        ended += thread.wait == Wait::Ended;
    }
    if (ended == threads.size()) {
        return false;
    }
    if (blocked < threads.size()) {
        fail("threads wait at a barrier for threads that have ended");
        return false;
    }
    for (Thread& thread : threads) {
        thread.wait = Wait::None;
    }
    return true;
}

void Launch::wait(Wait wait) {
    Thread& thread = threads[threadIdx.x];
    thread.wait = wait;
    switch_between(thread.fiber, scheduler, false);
}

void Launch::fail(const char* what) {
    error = error ? error : what;
}

uint32_t Launch::exchange(uint32_t bits, unsigned from) {
    Warp& warp = warps[threadIdx.x / WARP];
    Thread& thread = threads[threadIdx.x];
    uint32_t* slots = warp.slots[thread.shuffles++ % 2];
    slots[threadIdx.x % WARP] = bits;
    wait(Wait::Warp);
    return slots[from];
}

#ifdef __SANITIZE_ADDRESS__
static void switch_between(Fiber& from, Fiber& to, bool for_good) {
    void* saved = nullptr;
    __sanitizer_start_switch_fiber(for_good ? nullptr : &saved, to.stack, to.stack_size);
    swapcontext(&from.context, &to.context);
    __sanitizer_finish_switch_fiber(saved, nullptr, nullptr);
}

// In a fiber that has just been entered from `from`, whose stack becomes known.
static void arrive(Fiber& from) {
    const void* stack;
    __sanitizer_finish_switch_fiber(nullptr, &stack, &from.stack_size);
    from.stack = const_cast<char*>(static_cast<const char*>(stack));
}
#else
// A jump, where there has been one before: unlike swapcontext it does not enter the system.
static void switch_between(Fiber& from, Fiber& to, bool) {
    if (_setjmp(from.place) != 0) {
        return;
    }
    if (to.entered) {
        _longjmp(to.place, 1);
    }
    to.entered = true;
    setcontext(&to.context);
}

static void arrive(Fiber&) {}
#endif

void* shared() { return launch->memory; }

void require_aligned(const void* pointer, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) {
        launch->fail("a pointer is not aligned to what is read or written there");
        launch->end();
    }
}

void wait_for_block() { launch->wait(Wait::Block); }
void wait_for_warp() { launch->wait(Wait::Warp); }
uint32_t exchange(uint32_t bits, unsigned from) { return launch->exchange(bits, from); }

static const Kernel* find(const char* name) {
    const Kernel* kernel = Kernel::first;
    while (kernel && strcmp(kernel->name, name) != 0) {
        kernel = kernel->next;
    }
    return kernel;
}

// Whether the driver would refuse the launch.
static const char* refusal(const Kernel& kernel, Index grid, unsigned block, unsigned shared) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) {
        return "no blocks";
    }
    if (grid.x > 0x7fffffff || grid.y > 0xffff || grid.z > 0xffff) {
        return "too many blocks";
    }
    if (block == 0 || block % WARP != 0 || block > kernel.bound) {
        return "no such size of blocks";
    }
    return shared > SHARED_LIMIT ? "too much shared memory" : nullptr;
}

static const char* mismatch(const Kernel& kernel, const Argument* arguments, size_t count) {
    bool same = strlen(kernel.kinds) == count;
    for (size_t i = 0; i < count && same; i++) {
        same = uint32_t(kernel.kinds[i]) == arguments[i].kind;
    }
    return same ? nullptr : "other arguments than its parameters";
}

static const char* run(Launch& it, Index grid, bool backwards) {
    const uint64_t count = uint64_t(grid.x) * grid.y * grid.z;
    for (uint64_t i = 0; i < count; i++) {
        const uint64_t block = backwards ? count - 1 - i : i;
        blockIdx = {unsigned(block % grid.x), unsigned(block / grid.x % grid.y),
                    unsigned(block / grid.x / grid.y)};
        if (!it.run_block(backwards, i + 1 == count)) {
            break;
        }
    }
    return it.error;
}

} // namespace host

// Runs the kernel of that name, its blocks and threads from the first to the last or backwards.
// Gives what is wrong, if anything is.
extern "C" const char* florence_cuda_launch(
    const char* name, const unsigned* grid, unsigned block, unsigned shared,
    const host::Argument* arguments, size_t count, bool backwards) {
    const host::Index blocks = {grid[0], grid[1], grid[2]};
    const host::Kernel* kernel = host::find(name);
    if (!kernel) {
        return "no such kernel";
    }
    if (const char* error = host::mismatch(*kernel, arguments, count)) {
        return error;
    }
    if (const char* error = host::refusal(*kernel, blocks, block, shared)) {
        return error;
    }
    host::Launch launch(*kernel, arguments, block, shared);
    host::launch = &launch;
    gridDim = blocks;
    blockDim = {block, 1, 1};
    const char* error = host::run(launch, blocks, backwards);
    host::launch = nullptr;
    return error;
}
