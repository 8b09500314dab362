//! What the kernel says of this process and its threads: where it will write for each of them when it ends, where they run, and whether it has pages
//! pinned. *Fault path.*
//!
//! Who uses it: `uhmm-core`, to know which pages must stay, and where a thread runs.
//!
//! ```
//! use uhmm_os::{tasks, thread};
//!
//! assert!(tasks::last_core(thread::gettid()).is_some());
//!
//! let mut heads = 0;
//! let listed = tasks::for_each_robust_list_head(|_address| heads += 1);
//! assert!(listed && heads >= 1); // the C library registers one for each thread
//!
//! let (value, mut word) = (42usize, [0usize]);
//! assert!(tasks::read_words(&raw const value as usize, &mut word) && word[0] == 42);
//! assert!(!tasks::read_words(0x1000, &mut word)); // nothing is mapped there
//! ```

use crate::syscall::{abi, call};
use crate::thread::getpid;
use crate::{Errno, system};
use core::ffi::CStr;
use core::mem::MaybeUninit;
use rustix::fd::{BorrowedFd, RawFd};

/// Calls `f` with the address of every thread's robust list head (get_robust_list(2)); threads without one are left out.
///
/// A C library registers one for each thread it makes, in that thread's control block. A head may be given more than once. Returns false if the threads cannot be
/// listed.
pub fn for_each_robust_list_head(mut f: impl FnMut(usize)) -> bool {
    // When a thread ends while they are listed, the kernel may skip another. Then there are more of them than were listed and are alive; as there are when one
    // was made meanwhile.
    const TRIES: usize = 100;
    (0..TRIES).any(|_| list_robust_list_heads(&mut f).is_some_and(|(alive, threads)| alive >= threads))
}

/// Lists once: how many threads were found alive, and how many there are after that. `None` if they cannot be listed.
fn list_robust_list_heads(f: &mut impl FnMut(usize)) -> Option<(usize, usize)> {
    let path = c"/proc/self/task";
    let flags = abi::O_RDONLY | abi::O_DIRECTORY | abi::O_CLOEXEC;
    // SAFETY: a path that ends with a zero, and flags.
    let open = || unsafe { call(abi::__NR_openat, [abi::AT_FDCWD as usize, path.as_ptr() as usize, flags as usize, 0]) };
    let fd = match open() {
        Err(Errno::MFILE) => system::with_more_files(open), // a program that has lowered its limit goes on being served
        opened => opened,
    }
    .ok()?;
    let (mut listed, mut alive) = (true, 0);
    let mut buffer = [0u64; 256];
    loop {
        // SAFETY: the buffer is valid for writes of its length and aligned for linux_dirent64.
        let read = unsafe { call(abi::__NR_getdents64, [fd, buffer.as_mut_ptr() as usize, size_of_val(&buffer)]) };
        match read {
            Ok(0) => break,
            Ok(len) => each_entry(&buffer, len, |tid| {
                if let Some(head) = robust_list_head(tid) {
                    alive += 1;
                    if head != 0 {
                        f(head);
                    }
                }
            }),
            Err(_) => {
                listed = false;
                break;
            }
        }
    }
    // The links of the directory: itself, its parent, and one for each thread.
    // SAFETY: opened above, and still open.
    let links = rustix::fs::fstat(unsafe { BorrowedFd::borrow_raw(fd as RawFd) }).map(|stat| stat.st_nlink);
    // SAFETY: opened above.
    let _ = unsafe { call(abi::__NR_close, [fd]) };
    listed.then_some((alive, usize::try_from(links.ok()?).ok()?.saturating_sub(2)))
}

/// Calls `f` for every entry of a directory listing (getdents64(2)) whose name is a number.
fn each_entry(buffer: &[u64; 256], len: usize, mut f: impl FnMut(usize)) {
    let byte = |at: usize| (buffer[at / 8] >> (at % 8 * 8)) as u8;
    let mut at = 0;
    // An entry is inode, offset (8 bytes each), record length (2), type (1), name.
    while at + 19 < len {
        let record = usize::from(byte(at + 16)) | usize::from(byte(at + 17)) << 8;
        let mut number = 0usize;
        let mut digits = 0;
        for i in at + 19..(at + record).min(len) {
            match byte(i) {
                digit @ b'0'..=b'9' => number = number * 10 + usize::from(digit - b'0'),
                0 => break,
                _ => {
                    digits = 0;
                    break;
                }
            }
            digits += 1;
        }
        if digits > 0 {
            f(number);
        }
        at += record.max(19);
    }
}

/// A thread's list head, 0 if it has none; `None` if there is no such thread.
fn robust_list_head(tid: usize) -> Option<usize> {
    let mut head = MaybeUninit::<usize>::uninit();
    let mut len = MaybeUninit::<usize>::uninit();
    // SAFETY: both are valid for the writes of get_robust_list(2).
    unsafe { call(abi::__NR_get_robust_list, [tid, head.as_mut_ptr() as usize, len.as_mut_ptr() as usize]) }.ok()?;
    // SAFETY: the call has succeeded and written it.
    Some(unsafe { head.assume_init() })
}

/// What lies at a robust list head (`struct robust_list_head`): the first entry's address, the word's offset from an entry, the entry that is just being
/// locked or unlocked.
pub type RobustHead = [usize; 3];

/// Calls `f` with the bytes that the kernel reads or writes on behalf of a thread that ends, as robust_list(7) describes its list: each entry's link, and
/// the futex word beside it. `words` is what lies at the thread's list head, `head`; `read` fills in the words at an address, and returns false where they
/// cannot be had, which ends the walk, as does the kernel's own bound. Each range is given before it is read.
pub fn for_each_robust_entry(
    head: usize,
    words: RobustHead,
    mut read: impl FnMut(usize, &mut [usize]) -> bool,
    mut f: impl FnMut(usize, usize),
) {
    const WORD: usize = size_of::<usize>();
    /// ROBUST_LIST_LIMIT: so many entries does the kernel look at.
    const MOST: usize = 2048;
    let [mut entry, offset, pending] = words;
    let mut give = |entry: usize| {
        f(entry, WORD);
        f(entry.wrapping_add(offset), size_of::<u32>());
    };
    // The lowest bit of an address is a flag (priority inheritance).
    if pending & !1 != 0 {
        give(pending & !1);
    }
    for _ in 0..MOST {
        entry &= !1;
        if entry == head || entry == 0 {
            return;
        }
        give(entry);
        let mut next = [0];
        if !read(entry, &mut next) {
            return;
        }
        [entry] = next;
    }
}

/// Reads what lies at several list heads by one call, up to the first that cannot be read: how many were read. Waits as [`read_words`] does.
pub fn read_heads(heads: &[usize; HEADS], words: &mut [RobustHead; HEADS], count: usize) -> usize {
    const LEN: usize = size_of::<RobustHead>();
    let local = [words.as_mut_ptr() as usize, count.min(HEADS) * LEN]; // struct iovec
    let remote = heads.map(|head| [head, LEN]);
    let remote = [remote.as_ptr() as usize, count.min(HEADS)];
    // SAFETY: the kernel writes the words only, and looks at the remote addresses itself.
    let read = unsafe { call(abi::__NR_process_vm_readv, [getpid() as usize, local.as_ptr() as usize, 1, remote[0], remote[1], 0]) };
    read.unwrap_or(0) / LEN
}

/// How many heads [`read_heads`] takes.
pub const HEADS: usize = 32;

/// Reads the words at an address of this process; false if nothing is mapped there or it is not aligned. Waits if a page is watched by a userfaultfd and
/// missing.
pub fn read_words(at: usize, words: &mut [usize]) -> bool {
    let len = size_of_val(words);
    let local = [words.as_mut_ptr() as usize, len]; // struct iovec
    let remote = [at, len];
    // SAFETY: the kernel writes the words only, and looks at the remote address itself.
    let read = unsafe { call(abi::__NR_process_vm_readv, [getpid() as usize, local.as_ptr() as usize, 1, remote.as_ptr() as usize, 1, 0]) };
    at.is_multiple_of(align_of::<usize>()) && read == Ok(len)
}

/// The core on which a thread of this process ran last (proc_pid_stat(5), field 39).
pub fn last_core(tid: u32) -> Option<usize> {
    let mut text = [0u8; 512];
    core_field(read_of(tid, b"/stat", &mut text)?)
}

/// Whether a thread of this process is called `name`, of which [`NAME`](crate::thread::NAME) bytes count (proc_pid_comm(5)).
pub fn is_named(tid: u32, name: &CStr) -> bool {
    let mut text = [0u8; 32];
    let name = name.to_bytes();
    let name = &name[..name.len().min(crate::thread::NAME)];
    read_of(tid, b"/comm", &mut text).and_then(|text| text.strip_suffix(b"\n")) == Some(name)
}

/// Reads the beginning of a file of a thread's.
fn read_of<'a>(tid: u32, file: &[u8], text: &'a mut [u8]) -> Option<&'a [u8]> {
    // "/proc/self/task/", a number and the file, without formatting machinery.
    let mut path = [0u8; 48];
    let mut digits = [0u8; 10];
    let (mut count, mut rest) = (0, tid);
    while rest > 0 || count == 0 {
        digits[count] = b'0' + (rest % 10) as u8;
        (count, rest) = (count + 1, rest / 10);
    }
    let parts = b"/proc/self/task/".iter().chain(digits[..count].iter().rev()).chain(file);
    path.iter_mut().zip(parts).for_each(|(to, from)| *to = *from);
    // SAFETY: the path ends with a zero, for it is shorter than its array; the buffer is valid for writes of its length; what was opened is closed.
    let len = unsafe {
        let flags = abi::O_RDONLY | abi::O_CLOEXEC;
        let fd = call(abi::__NR_openat, [abi::AT_FDCWD as usize, path.as_ptr() as usize, flags as usize, 0]).ok()?;
        let read = call(abi::__NR_read, [fd, text.as_mut_ptr() as usize, text.len()]);
        let _ = call(abi::__NR_close, [fd]);
        read.ok()?
    };
    Some(&text[..len])
}

/// Field 39 of a stat line. The second field is a name in parentheses that may hold anything, so fields are counted from its end.
fn core_field(line: &[u8]) -> Option<usize> {
    let name_end = line.iter().rposition(|&byte| byte == b')')?;
    let field = line[name_end + 1..].split(|&byte| byte == b' ').filter(|field| !field.is_empty()).nth(39 - 3)?;
    field.iter().try_fold(0usize, |number, &digit| digit.is_ascii_digit().then(|| number * 10 + usize::from(digit - b'0')))
}

/// Whether pages of this process are pinned for long, as a ring's registered buffers are (`VmPin`, proc_pid_status(5)): what has them writes to them without a
/// fault. True if it cannot be told.
pub fn has_pinned_pages() -> bool {
    let path = c"/proc/self/status";
    let mut text = [0u8; 8192];
    let flags = abi::O_RDONLY | abi::O_CLOEXEC;
    // SAFETY: the path ends with a zero; the buffer is valid for writes of its length; what was opened is closed.
    let read = unsafe {
        let Ok(fd) = call(abi::__NR_openat, [abi::AT_FDCWD as usize, path.as_ptr() as usize, flags as usize, 0]) else { return true };
        let read = call(abi::__NR_read, [fd, text.as_mut_ptr() as usize, text.len()]);
        let _ = call(abi::__NR_close, [fd]);
        read
    };
    let line = read.ok().and_then(|len| text[..len].split(|&byte| byte == b'\n').find_map(|line| line.strip_prefix(b"VmPin:")));
    line.is_none_or(|number| number.iter().any(|digit| (b'1'..=b'9').contains(digit)))
}

/// Writes to standard error, unbuffered.
pub fn write_stderr(text: &[u8]) {
    // SAFETY: the text is valid for reads of its length.
    let _ = unsafe { call(abi::__NR_write, [2, text.as_ptr() as usize, text.len()]) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc::{Sender, channel};
    use std::time::{Duration, Instant};

    #[test]
    fn a_threads_core_is_found_whatever_its_name() {
        std::thread::Builder::new()
            .name(") 1 2 (x".into())
            .spawn(|| {
                crate::thread::set_affinity(&[0]).unwrap();
                assert_eq!(last_core(crate::thread::gettid()), Some(0));
                let last = crate::thread::num_cores() - 1;
                crate::thread::set_affinity(&[last]).unwrap();
                assert_eq!(last_core(crate::thread::gettid()), Some(last));
            })
            .unwrap()
            .join()
            .unwrap();
        assert_eq!(last_core(u32::MAX), None);
    }

    #[test]
    fn threads_that_are_made_have_the_name_of_who_makes_them() {
        use crate::thread::{gettid, named};
        let tid = || {
            let (tell, told) = std::sync::mpsc::channel();
            let (end, ended) = std::sync::mpsc::channel::<()>();
            std::thread::spawn(move || {
                tell.send(gettid()).unwrap();
                ended.recv().unwrap_err();
            });
            (told.recv().unwrap(), end)
        };
        let (other, _end) = tid();
        let (made, end) = named(c"a library's threads", tid);
        assert!(is_named(made, c"a library's thr") && is_named(made, c"a library's threads") && !is_named(made, c"a library's th"));
        assert!(!is_named(other, c"a library's threads") && !is_named(gettid(), c"a library's threads"));
        drop(end);
        assert!(!is_named(u32::MAX, c"") && !is_named(0, c"a"));
    }

    #[test]
    fn a_robust_list_is_walked_as_the_kernel_does() {
        // head, then entries with their words 16 bytes before them; the last one's link has the flag of priority inheritance.
        let at = |index: usize| 0x1000 + 8 * index;
        let mut list = [0usize; 64];
        let offset = 0usize.wrapping_sub(16);
        (list[0], list[1], list[2]) = (at(10), offset, at(30) | 1);
        (list[10], list[20]) = (at(20) | 1, at(0));
        let read = |address: usize, words: &mut [usize]| {
            let index = address.wrapping_sub(at(0)) / 8;
            list.get(index..index + words.len()).map(|found| words.copy_from_slice(found)).is_some()
        };
        let mut given = vec![];
        let head = [list[0], list[1], list[2]];
        for_each_robust_entry(at(0), head, read, |start, len| given.push((start, len)));
        let entry = |index: usize| [(at(index), 8), (at(index) - 16, 4)];
        assert_eq!(given, [entry(30), entry(10), entry(20)].concat());
        // A list that never ends, and one whose entry cannot be read, do end.
        let mut count = 0;
        let endless = |_: usize, words: &mut [usize]| {
            words.fill(at(1));
            true
        };
        for_each_robust_entry(at(0), [at(1); 3], endless, |_, _| count += 1);
        assert_eq!(count, 2 * 2049);
        for_each_robust_entry(at(0), head, |address, words| address < at(3) && read(address, words), |_, _| count += 1);
        assert_eq!(count, 2 * 2049 + 4);
    }

    #[test]
    fn words_are_read_and_what_is_no_word_is_not() {
        let word = 0x1234_5678_9abcusize;
        let at = &raw const word as usize;
        let mut read = [0];
        assert!(read_words(at, &mut read));
        assert_eq!(read, [word]);
        for bad in [at + 1, 0, 8, usize::MAX - 7] {
            assert!(!read_words(bad, &mut read), "{bad:#x}");
        }
        // Heads are read up to the first that is not there.
        let head: RobustHead = [1, 2, 3];
        let (mut heads, mut words) = ([&raw const head as usize; HEADS], [[0; 3]; HEADS]);
        assert_eq!(read_heads(&heads, &mut words, HEADS), HEADS);
        assert_eq!(words, [head; HEADS]);
        (heads[2], words) = (8, [[0; 3]; HEADS]);
        assert_eq!(read_heads(&heads, &mut words, HEADS), 2);
        assert_eq!(words[..3], [head, head, [0; 3]]);
        assert_eq!(read_heads(&heads, &mut words, 1), 1);
    }

    #[test]
    fn every_thread_has_its_head_in_its_own_control_block() {
        let (started, begun) = channel();
        let mut ends = vec![];
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let started = started.clone();
                let (end, ended) = channel::<()>();
                ends.push(end);
                std::thread::spawn(move || {
                    // SAFETY: pthread_self is the address of this thread's control block.
                    let block = unsafe { libc::pthread_self() } as usize;
                    started.send((crate::thread::gettid(), block)).unwrap();
                    let _ = ended.recv(); // an error: the test has ended
                })
            })
            .collect();
        for _ in 0..3 {
            let (tid, block) = begun.recv().unwrap();
            let mut heads = vec![];
            assert!(for_each_robust_list_head(|head| heads.push(head)));
            let head = robust_list_head(tid as usize).unwrap();
            assert!(heads.contains(&head));
            assert!((block..block + 4096).contains(&head), "{head:#x} {block:#x}");
        }
        drop(ends);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }

    /// Starts threads that end at once, four at a time.
    fn start_and_end(stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            let some: Vec<_> = (0..4).map(|_| std::thread::spawn(|| {})).collect();
            some.into_iter().for_each(|thread| thread.join().unwrap());
        }
    }

    /// Starts a thread each millisecond that lives for 50 ms, and sends its list head and until when it is to be looked for. The last that was started
    /// stands behind all that end.
    fn start_and_tell(stop: &AtomicBool, tell: &Sender<(usize, Instant)>) {
        while !stop.load(Ordering::Relaxed) {
            let (tell, until) = (tell.clone(), Instant::now() + Duration::from_millis(5));
            std::thread::spawn(move || {
                tell.send((robust_list_head(crate::thread::gettid() as usize).unwrap(), until)).unwrap();
                std::thread::sleep(Duration::from_millis(50));
            });
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Lists all threads, over and over, while that of `head` lives: how often it was missing. On a busy machine a listing may take longer than it lives.
    fn times_missing(head: usize, until: Instant) -> usize {
        let mut missing = 0;
        while Instant::now() < until {
            let mut found = false;
            assert!(for_each_robust_list_head(|other| found |= other == head));
            missing += usize::from(!found && Instant::now() < until + Duration::from_millis(40));
        }
        missing
    }

    /// The story: a thread that lived was missing from the list, because another one had ended while it was read.
    #[test]
    fn no_thread_that_lives_is_skipped_when_others_end() {
        let stop = AtomicBool::new(false);
        let (tell, told) = channel();
        std::thread::scope(|scope| {
            (0..3).for_each(|_| drop(scope.spawn(|| start_and_end(&stop))));
            scope.spawn(|| start_and_tell(&stop, &{ tell }));
            let end = Instant::now() + Duration::from_secs(2);
            let threads = told.iter().take_while(|_| Instant::now() < end);
            let missing: usize = threads.map(|(head, until)| times_missing(head, until)).sum();
            stop.store(true, Ordering::Relaxed);
            assert_eq!(missing, 0);
        });
    }
}
