//! What this kernel is, what this process may do, and the hooks around fork.
//!
//! Not *Fault path*: files are read into strings.
//!
//! Who uses it: `uhmm doctor`; `uhmm-core`, when it starts.
//!
//! ```
//! use uhmm_os::system;
//!
//! assert!(system::kernel_version() >= (3, 0));
//! assert!(system::total_memory() > 0);
//! if !system::has_cap_sys_ptrace() && system::unprivileged_userfaultfd() != Some(true) {
//!     println!("user-mode-only at most, unless /dev/userfaultfd opens: {:?}", system::dev_userfaultfd());
//! }
//! ```

use crate::{Errno, thread};
use core::sync::atomic::{AtomicU32, Ordering};
use rustix::fs::{Mode, OFlags};
use rustix::thread::CapabilitySet;
use std::fs::read_to_string;

/// How the kernel commits memory (`vm.overcommit_memory`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overcommit {
    /// 0: obvious overcommits are refused; reservations (`MAP_NORESERVE`) are free.
    Heuristic,
    /// 1: nothing is refused.
    Always,
    /// 2: every writable private byte counts, reserved or not: large reservations fail.
    Strict,
}

/// The kernel's release, as `uname -r`: "6.18.44".
pub fn kernel_release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// Its version, major and minor; (0, 0) if the release does not start with two numbers.
pub fn kernel_version() -> (u32, u32) {
    version_of(&kernel_release()).unwrap_or((0, 0))
}

fn version_of(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// Bytes of memory of the machine (not of a container's limit).
pub fn total_memory() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram as u64 * u64::from(info.mem_unit)
}

/// When transparent huge pages are used: "always", "madvise" or "never"; `None` where the kernel has none.
pub fn thp_mode() -> Option<String> {
    chosen(&read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").ok()?)
}

/// The word in brackets.
fn chosen(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

/// Whether this thread has `CAP_SYS_PTRACE` (in effect): kernel faults and fork events.
pub fn has_cap_sys_ptrace() -> bool {
    rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_PTRACE))
}

/// sysctl `vm.unprivileged_userfaultfd`: whether any user may handle kernel faults; `None` where the kernel has no such setting.
pub fn unprivileged_userfaultfd() -> Option<bool> {
    sysctl("unprivileged_userfaultfd").map(|value| value != 0)
}

/// Whether `/dev/userfaultfd` can be opened.
///
/// # Errors
/// Why not: `ENOENT` (before Linux 6.1, or not passed into the container), `EACCES`.
pub fn dev_userfaultfd() -> Result<(), Errno> {
    rustix::fs::open("/dev/userfaultfd", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map(drop)
}

/// How many mappings a process may have (`vm.max_map_count`).
pub fn max_map_count() -> Option<usize> {
    sysctl("max_map_count").and_then(|value| value.try_into().ok())
}

/// How memory is committed.
pub fn overcommit() -> Option<Overcommit> {
    match sysctl("overcommit_memory")? {
        0 => Some(Overcommit::Heuristic),
        1 => Some(Overcommit::Always),
        2 => Some(Overcommit::Strict),
        _ => None,
    }
}

fn sysctl(name: &str) -> Option<i64> {
    read_to_string(format!("/proc/sys/vm/{name}")).ok()?.trim().parse().ok()
}

/// Registers functions that glibc's fork calls (pthread_atfork(3)): `prepare` before, in the forking thread; `parent` and `child`
/// after. They stay registered for ever. vfork, posix_spawn, raw clone and `_Fork` do not call them.
///
/// No example: the three functions run in every fork of the process from then on, and cannot be taken back.
///
/// # Errors
/// `ENOMEM`.
///
/// # Safety
/// The functions must not unwind, and `child` must be async-signal-safe if the process has several threads.
pub unsafe fn atfork(prepare: extern "C" fn(), parent: extern "C" fn(), child: extern "C" fn()) -> Result<(), Errno> {
    // SAFETY: three functions of the form it wants, which live as long as this code.
    match unsafe { libc::pthread_atfork(Some(prepare), Some(parent), Some(child)) } {
        0 => Ok(()),
        code => Err(Errno::from_raw_os_error(code)),
    }
}

/// Keeps the library that holds the code at `address` in the process for good, as threads and handlers run in it (dlopen(3), `RTLD_NODELETE`). Does
/// nothing for the program itself.
pub fn pin_library(address: usize) {
    let mut info = core::mem::MaybeUninit::<libc::Dl_info>::uninit();
    // SAFETY: `info` is valid for the write; the name that it then holds is the loader's own, and stays while the library does, which the
    // caller runs in.
    unsafe {
        if libc::dladdr(address as *const libc::c_void, info.as_mut_ptr()) != 0 {
            let name = info.assume_init().dli_fname;
            if !name.is_null() {
                libc::dlopen(name, libc::RTLD_NOLOAD | libc::RTLD_NOW | libc::RTLD_NODELETE);
            }
        }
    }
}

/// The statics without initial value (`.bss`) of the C library, from the first byte to one past the last; `None` if it cannot be told where they are.
///
/// glibc's memcpy and memset, which compilers call for any large value, read thresholds there. In a program that is linked statically these are the
/// program's own statics too.
pub fn c_library_statics() -> Option<(usize, usize)> {
    struct Search {
        code: usize,
        found: Option<(usize, usize)>,
    }
    /// # Safety
    /// As dl_iterate_phdr(3) calls it, with a `Search`.
    unsafe extern "C" fn look(info: *mut libc::dl_phdr_info, _: usize, search: *mut libc::c_void) -> libc::c_int {
        // SAFETY: by the contract; the headers are the loader's and stay during the call.
        let (info, search) = unsafe { (&*info, &mut *search.cast::<Search>()) };
        if info.dlpi_phdr.is_null() {
            return 0;
        }
        // SAFETY: as above.
        let headers = unsafe { core::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) };
        let loaded = || headers.iter().filter(|header| header.p_type == libc::PT_LOAD);
        let start = |header: &libc::Elf64_Phdr| info.dlpi_addr as usize + header.p_vaddr as usize;
        if !loaded().any(|header| (start(header)..start(header) + header.p_memsz as usize).contains(&search.code)) {
            return 0;
        }
        let zeroed = loaded().find(|header| header.p_memsz > header.p_filesz);
        search.found = zeroed.map(|header| (start(header) + header.p_filesz as usize, start(header) + header.p_memsz as usize));
        1
    }
    // By name, for the linker may give a stub's address.
    // SAFETY: the name ends with a zero.
    let named = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"memcpy".as_ptr()) } as usize;
    let code = if named != 0 { named } else { libc::memcpy as *const () as usize };
    let mut search = Search { code, found: None };
    // SAFETY: the function keeps to the contract, and the search outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(look), (&raw mut search).cast()) };
    search.found
}

/// Does something while the process may open as many descriptors as its hard limit allows, or, with `CAP_SYS_RESOURCE`, some more; other threads may meanwhile, too. *Fault path.*
pub fn with_more_files<R>(f: impl FnOnce() -> R) -> R {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    // One at a time, or who comes second takes the raised limit for the program's, and leaves it so. Not zeros, for memory of zeros could be what is waited for.
    const FREE: u32 = 1;
    const TAKEN: u32 = 2;
    static TURN: AtomicU32 = AtomicU32::new(FREE);
    // A child that was forked in the middle of somebody's turn waits in vain, once: half a second.
    const TIMES: u32 = 10_000;
    for times in 0..TIMES {
        if TURN.compare_exchange(FREE, TAKEN, Ordering::Acquire, Ordering::Relaxed).is_ok() {
            break;
        }
        thread::pause(times);
    }
    let before = getrlimit(Resource::Nofile);
    let beyond = before.maximum.map(|most| most.saturating_add(64));
    if setrlimit(Resource::Nofile, Rlimit { current: beyond, maximum: beyond }).is_err() {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: before.maximum, maximum: before.maximum });
    }
    let result = f();
    let _ = setrlimit(Resource::Nofile, before);
    TURN.store(FREE, Ordering::Release);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses() {
        assert_eq!(version_of("6.18.44-fc-v782"), Some((6, 18)));
        assert_eq!(version_of("7.0-rc1"), Some((7, 0)));
        assert_eq!(version_of("strange"), None);
        assert_eq!(chosen("always [madvise] never\n").as_deref(), Some("madvise"));
        assert_eq!(chosen("nothing"), None);
    }

    /// Who came while another had raised it took that for the program's limit, and set it in the end.
    #[test]
    fn the_limit_of_files_is_as_it_was() {
        use rustix::process::{Resource, getrlimit};
        let before = getrlimit(Resource::Nofile);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..500).for_each(|_| with_more_files(thread::yield_now)));
            }
        });
        assert_eq!(getrlimit(Resource::Nofile), before);
    }

    /// Compared with what other files of /proc say.
    #[test]
    fn agrees_with_proc() {
        let release = read_to_string("/proc/sys/kernel/osrelease").unwrap();
        assert_eq!(kernel_release(), release.trim());
        assert!(kernel_version() >= (4, 0), "{:?}", kernel_version());
        let meminfo = read_to_string("/proc/meminfo").unwrap();
        let kib: u64 = meminfo.split_whitespace().nth(1).unwrap().parse().unwrap();
        assert_eq!(total_memory(), kib * 1024);
        let status = read_to_string("/proc/thread-self/status").unwrap();
        let effective = status.lines().find_map(|l| l.strip_prefix("CapEff:")).unwrap();
        let effective = u64::from_str_radix(effective.trim(), 16).unwrap();
        assert_eq!(has_cap_sys_ptrace(), effective & 1 << 19 != 0);
        assert!(max_map_count().unwrap() > 1000);
        assert!(overcommit().is_some());
    }

    static PREPARED: AtomicU32 = AtomicU32::new(0);
    static PARENT: AtomicU32 = AtomicU32::new(0);
    static CHILD: AtomicU32 = AtomicU32::new(0);

    extern "C" fn prepare() {
        PREPARED.fetch_add(1, Ordering::Relaxed);
    }
    extern "C" fn parent() {
        PARENT.fetch_add(1, Ordering::Relaxed);
    }
    extern "C" fn child() {
        CHILD.fetch_add(1, Ordering::Relaxed);
    }

    #[test]
    fn fork_calls_the_hooks() {
        // SAFETY: the hooks only count; the child calls nothing but _exit.
        unsafe {
            atfork(prepare, parent, child).unwrap();
            let before = PREPARED.load(Ordering::Relaxed);
            let pid = libc::fork();
            if pid == 0 {
                libc::_exit(if CHILD.load(Ordering::Relaxed) == 1 { 7 } else { 1 });
            }
            let mut status = 0;
            assert_eq!(libc::waitpid(pid, &mut status, 0), pid);
            assert_eq!(libc::WEXITSTATUS(status), 7);
            assert!(PREPARED.load(Ordering::Relaxed) > before);
            assert_eq!(CHILD.load(Ordering::Relaxed), 0);
            assert!(PARENT.load(Ordering::Relaxed) > 0);
        }
    }

    #[test]
    fn the_statics_of_the_c_library_lie_behind_its_file() {
        let (start, end) = c_library_statics().unwrap();
        assert!(end - start > 4096 && end - start < 1 << 20);
        let maps = read_to_string("/proc/self/maps").unwrap();
        let mapping = format!("{:x}-", start.next_multiple_of(4096));
        let mut lines = maps.lines();
        let file = lines.by_ref().take_while(|line| !line.starts_with(&mapping)).last().unwrap();
        assert!(file.contains("rw-p") && file.contains("libc"), "{file}");
    }
}
