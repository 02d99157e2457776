//! A wall clock that a test can set, for a server and all its threads: libfaketime, from Debian's
//! package `faketime`. The monotonic clock runs on.

use std::{path::PathBuf, process::Command};

use tempfile::TempDir;

/// The offset of a server's wall clock from the real one.
pub struct Clock {
    directory: TempDir,
}

/// The library, wherever Debian has it for this processor.
fn library() -> PathBuf {
    let found = std::fs::read_dir("/usr/lib").unwrap().filter_map(|entry| {
        let path = entry.ok()?.path().join("faketime/libfaketimeMT.so.1");
        path.is_file().then_some(path)
    });
    found.into_iter().next().unwrap_or_else(|| {
        panic!("libfaketimeMT.so.1 is missing: install the package faketime, or run `make test`")
    })
}

/// Valkey loads modules so that they look for functions in the C library first, and would not see
/// what is preloaded; this takes the flag away.
const SHALLOW: &str = "
    #define _GNU_SOURCE
    #include <dlfcn.h>
    void *dlopen(const char *path, int flags) {
        void *(*real)(const char *, int) = dlsym(RTLD_NEXT, \"dlopen\");
        return real(path, flags & ~RTLD_DEEPBIND);
    }
";

impl Clock {
    /// A clock that is right.
    pub fn new() -> Self {
        let clock = Self { directory: tempfile::tempdir().unwrap() };
        let source = clock.directory.path().join("shallow.c");
        std::fs::write(&source, SHALLOW).unwrap();
        let mut compile = Command::new("cc");
        compile.args(["-shared", "-fPIC", "-o"]).arg(clock.shallow()).arg(source);
        let compiled = compile.output().unwrap();
        assert!(compiled.status.success(), "{compiled:?}");
        clock.set(0);
        clock
    }

    fn shallow(&self) -> PathBuf {
        self.directory.path().join("shallow.so")
    }

    /// What a server's environment must say.
    pub fn env(&self) -> Vec<(&'static str, String)> {
        // libfaketime allocates when it is first asked for the time, and Debian's jemalloc asks for
        // the time when it first allocates: the C library's own allocator must come before it.
        let libraries = format!("{}:{}:libc.so.6", self.shallow().display(), library().display());
        vec![
            ("LD_PRELOAD", libraries),
            ("FAKETIME_TIMESTAMP_FILE", self.file().display().to_string()),
            ("FAKETIME_NO_CACHE", "1".to_owned()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
        ]
    }

    /// Sets the clock to so many seconds after the real one, before it if negative.
    pub fn set(&self, seconds: i64) {
        // The server reads the file at any moment: it must never see half of it.
        let new = self.directory.path().join("new");
        std::fs::write(&new, format!("{seconds:+}")).unwrap();
        std::fs::rename(new, self.file()).unwrap();
    }

    fn file(&self) -> PathBuf {
        self.directory.path().join("offset")
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}
