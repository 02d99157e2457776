//! Trials in a child process: what may end a process ends the child only.
//!
//! Processors have died of instructions that they claim to have, and a service manager may have a
//! process killed for a system call.
#![expect(unsafe_code, reason = "a process that shares our memory")]

/// Runs `attempt` in a child process; whether it returned `true` there. The child shares this
/// process' memory, which nothing copies, however large it is, and this thread waits for it. No
/// signal handler runs in it: a fault just ends it.
pub(crate) fn succeeds<F: FnMut() -> bool>(attempt: &mut F) -> bool {
    const STACK: usize = 1 << 20;

    extern "C" fn run<F: FnMut() -> bool>(attempt: *mut libc::c_void) -> libc::c_int {
        let no_core = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: the parent waits, so nobody else has the attempt; limits are the child's own.
        let is_right = unsafe {
            libc::setrlimit(libc::RLIMIT_CORE, &raw const no_core);
            (*attempt.cast::<F>())()
        };
        libc::c_int::from(!is_right)
    }

    let mut stack = vec![0u128; STACK / size_of::<u128>()];
    // SAFETY: a signal set is plain bits, which `sigfillset` and `pthread_sigmask` write. The
    // child's stack is its own and outlives it, since the flags have this thread wait. Without a
    // signal at its end, nobody but this call collects it.
    unsafe {
        let mut all = std::mem::zeroed::<libc::sigset_t>();
        let mut before = all;
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        let top = stack.as_mut_ptr_range().end.cast();
        let flags = libc::CLONE_VM | libc::CLONE_VFORK;
        let child = libc::clone(run::<F>, top, flags, (&raw mut *attempt).cast());
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut());
        let mut status = -1;
        child > 0
            && libc::waitpid(child, &raw mut status, libc::__WALL) == child
            && libc::WIFEXITED(status)
            && libc::WEXITSTATUS(status) == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ends_a_child_ends_only_the_child() {
        let mut tries = 0;
        assert!(succeeds(&mut || {
            tries += 1;
            true
        }));
        assert_eq!(tries, 1, "the child shares our memory");
        assert!(!succeeds(&mut || false));
        // SAFETY: it ends the process that runs it, which is the child.
        #[cfg(target_arch = "x86_64")]
        assert!(!succeeds(&mut || unsafe { std::arch::asm!("ud2", options(noreturn)) }));
        let nowhere = std::ptr::without_provenance::<u8>(8);
        // SAFETY: as above.
        assert!(!succeeds(&mut || unsafe { nowhere.read_volatile() == 0 }));
    }
}
