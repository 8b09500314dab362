//! Copies that bypass the cache on the way out, as a DMA engine would, and copies that survive a bad address. *Fault path.*
//!
//! Non-temporal stores neither read the destination's lines first nor push the program's data out of the cache: on whole blocks they
//! run at about 1.5 times memcpy. 16-byte stores with the source prefetched past the cache are at least as fast as 32-byte ones
//! without, so SSE2, which every x86-64 processor has, is all that is needed, and no feature detection.
//!
//! The loops are assembly, because [`guarded`] needs to know where its instructions lie: like the kernel's exception tables, the
//! handler of [`signal`](crate::signal) looks whether a fault's instruction lies between two labels, and if so goes on at a third,
//! with the fault's address in a register.
//!
//! Who uses it: drivers, for their copy engines.
//!
//! ```
//! use uhmm_os::{copy, signal};
//!
//! let (from, mut to) = ([7u8; 4096], [0u8; 4096]);
//! // SAFETY: both are 4096 bytes, and ours.
//! unsafe { copy::stream(to.as_mut_ptr(), from.as_ptr(), 4096) };
//! assert_eq!(to, from);
//!
//! signal::install(|_| false)?; // the handler that lets a guarded copy fail
//! // SAFETY: the handler is installed; `to` is 4096 bytes, and ours.
//! let copied = unsafe { copy::guarded(to.as_mut_ptr(), 0x1000 as *const u8, 16) };
//! assert_eq!(copied, Err(0x1000)); // nothing is mapped there
//! # signal::uninstall();
//! # Ok::<(), uhmm_os::Errno>(())
//! ```

use core::arch::{asm, global_asm};

/// A copy loop (rdi: to, rsi: from, rdx: bytes) between labels `$name` and `$name_end`: bytes up to a cache line of the destination,
/// then 128 bytes a turn, then what is left. It uses no stack, so that it can be left from anywhere. Returns 0 in rax. What is to be done first may return by itself.
macro_rules! copy_loop {
    ($name:literal, $first:expr) => {
        concat!(
            ".pushsection .text.",
            $name,
            ", \"ax\", @progbits\n",
            ".balign 64\n",
            ".globl ",
            $name,
            "\n.hidden ",
            $name,
            "\n.type ",
            $name,
            ", @function\n",
            $name,
            ":\n",
            $first,
            "mov rcx, rdi\n",
            "neg rcx\n",
            "and ecx, 63\n",
            "cmp rcx, rdx\n",
            "cmova rcx, rdx\n",
            "sub rdx, rcx\n",
            "rep movsb\n",
            "mov rcx, rdx\n",
            "shr rcx, 7\n",
            "jz 3f\n",
            ".balign 32\n",
            "2:\n",
            "prefetchnta [rsi + 1024]\n",
            "prefetchnta [rsi + 1088]\n",
            "movdqu xmm0, [rsi]\n",
            "movdqu xmm1, [rsi + 16]\n",
            "movdqu xmm2, [rsi + 32]\n",
            "movdqu xmm3, [rsi + 48]\n",
            "movdqu xmm4, [rsi + 64]\n",
            "movdqu xmm5, [rsi + 80]\n",
            "movdqu xmm6, [rsi + 96]\n",
            "movdqu xmm7, [rsi + 112]\n",
            "movntdq [rdi], xmm0\n",
            "movntdq [rdi + 16], xmm1\n",
            "movntdq [rdi + 32], xmm2\n",
            "movntdq [rdi + 48], xmm3\n",
            "movntdq [rdi + 64], xmm4\n",
            "movntdq [rdi + 80], xmm5\n",
            "movntdq [rdi + 96], xmm6\n",
            "movntdq [rdi + 112], xmm7\n",
            "sub rsi, -128\n", // a byte shorter than adding 128
            "sub rdi, -128\n",
            "dec rcx\n",
            "jnz 2b\n",
            "3:\n",
            "mov ecx, edx\n",
            "and ecx, 127\n",
            "rep movsb\n",
            "sfence\n",
            "xor eax, eax\n",
            "ret\n",
            ".globl ",
            $name,
            "_end\n.hidden ",
            $name,
            "_end\n",
            $name,
            "_end:\n",
            ".size ",
            $name,
            ", . - ",
            $name,
            "\n",
            ".popsection\n",
        )
    };
}

/// Few bytes, as the nodes of a list have: from 8 on by moves that overlap, through the cache, for string instructions and a fence would cost several times as much. They go upwards,
/// without gaps, so that a fault tells the first byte of its page that cannot be reached.
macro_rules! few_bytes {
    () => {
        concat!(
            "cmp rdx, 64\n",
            "ja 6f\n",
            "cmp rdx, 16\n",
            "jb 5f\n",
            "movdqu xmm0, [rsi]\n",
            "cmp rdx, 32\n",
            "jbe 4f\n",
            "movdqu xmm2, [rsi + 16]\n",
            "movdqu xmm3, [rsi + rdx - 32]\n",
            "movdqu xmm1, [rsi + rdx - 16]\n",
            "movdqu [rdi], xmm0\n",
            "movdqu [rdi + 16], xmm2\n",
            "movdqu [rdi + rdx - 32], xmm3\n",
            "movdqu [rdi + rdx - 16], xmm1\n",
            "xor eax, eax\n",
            "ret\n",
            "4:\n",
            "movdqu xmm1, [rsi + rdx - 16]\n",
            "movdqu [rdi], xmm0\n",
            "movdqu [rdi + rdx - 16], xmm1\n",
            "xor eax, eax\n",
            "ret\n",
            "5:\n",
            "cmp rdx, 8\n",
            "jb 6f\n",
            "mov rax, [rsi]\n",
            "mov rcx, [rsi + rdx - 8]\n",
            "mov [rdi], rax\n",
            "mov [rdi + rdx - 8], rcx\n",
            "xor eax, eax\n",
            "ret\n",
            "6:\n",
        )
    };
}

global_asm!(
    copy_loop!("uhmm_os_stream", ""),
    copy_loop!("uhmm_os_guarded", few_bytes!()),
    // Where the fault handler goes on, the fault's address in rdx: the loop's caller gets 1 in rax and the address.
    ".pushsection .text.uhmm_os_guarded, \"ax\", @progbits",
    ".globl uhmm_os_guarded_fixup",
    ".hidden uhmm_os_guarded_fixup",
    ".type uhmm_os_guarded_fixup, @function",
    "uhmm_os_guarded_fixup:",
    "sfence",
    "mov eax, 1",
    "ret",
    ".size uhmm_os_guarded_fixup, . - uhmm_os_guarded_fixup",
    ".popsection",
);

/// Two registers: rax and rdx.
#[repr(C)]
struct Outcome {
    failed: usize,
    address: usize,
}

unsafe extern "C" {
    fn uhmm_os_stream(dst: *mut u8, src: *const u8, len: usize) -> usize;
    fn uhmm_os_guarded(dst: *mut u8, src: *const u8, len: usize) -> Outcome;
    fn uhmm_os_guarded_end();
    fn uhmm_os_guarded_fixup();
}

/// Where to go on if an instruction at `rip` faulted, in case it belongs to [`guarded`].
pub(crate) fn fixup(rip: usize) -> Option<usize> {
    let start = uhmm_os_guarded as *const () as usize;
    let end = uhmm_os_guarded_end as *const () as usize;
    (start <= rip && rip < end).then_some(uhmm_os_guarded_fixup as *const () as usize)
}

/// Copies `len` bytes past the cache; any alignment and length are right, whole cache lines of the destination are fast. All is
/// visible to other threads on return.
///
/// # Safety
/// As [`core::ptr::copy_nonoverlapping`]; but other threads may read and write the same bytes meanwhile (each byte is then the old
/// or the new one).
pub unsafe fn stream(dst: *mut u8, src: *const u8, len: usize) {
    // SAFETY: the loop writes and reads just those bytes; the caller vouches for them.
    unsafe { uhmm_os_stream(dst, src, len) };
}

/// Writes zeros past the cache; otherwise as [`stream`].
///
/// # Safety
/// `len` bytes at `dst` must be valid for writes.
pub unsafe fn stream_zero(dst: *mut u8, len: usize) {
    // SAFETY: only the bytes `dst..dst + len` are written, which the caller vouches for; all that is touched is declared.
    unsafe {
        asm!(
            "rep stosb", // up to a cache line
            "mov rcx, {rest}",
            "shr rcx, 7",
            "jz 3f",
            "pxor {zero}, {zero}",
            "2:",
            "movntdq [rdi], {zero}",
            "movntdq [rdi + 16], {zero}",
            "movntdq [rdi + 32], {zero}",
            "movntdq [rdi + 48], {zero}",
            "movntdq [rdi + 64], {zero}",
            "movntdq [rdi + 80], {zero}",
            "movntdq [rdi + 96], {zero}",
            "movntdq [rdi + 112], {zero}",
            "sub rdi, -128",
            "dec rcx",
            "jnz 2b",
            "3:",
            "mov rcx, {rest}",
            "and ecx, 127",
            "rep stosb",
            "sfence",
            rest = in(reg) len - head(dst, len),
            zero = out(xmm_reg) _,
            inout("rcx") head(dst, len) => _,
            inout("rdi") dst => _,
            in("al") 0u8,
            options(nostack),
        );
    }
}

/// Bytes before the next cache line, at most `len`.
fn head(dst: *mut u8, len: usize) -> usize {
    ((dst as usize).wrapping_neg() & 63).min(len)
}

/// As [`stream`], but a fault (SIGSEGV or SIGBUS) on the way ends the copy instead of the process.
///
/// The handlers of the program, and the one given to [`signal::install`](crate::signal::install), are not asked: a page that such a
/// handler would have brought counts as out of reach. Faults that a thread serves through a userfaultfd just wait, as anywhere.
///
/// # Errors
/// The address that could not be reached: the first such byte in its page; 0 where the processor does not tell (an address that is
/// not canonical). What was copied up to then is unknown.
///
/// # Safety
/// [`signal::install`](crate::signal::install) must have been called (else a fault is what it always is). The addresses may be
/// anything, but bytes at `dst` that can be written will be: nobody may rely on them. Neither signal may be blocked in the calling
/// thread.
pub unsafe fn guarded(dst: *mut u8, src: *const u8, len: usize) -> Result<(), usize> {
    // SAFETY: the loop writes and reads just those bytes, and is left at a fault; the caller vouches for the destination.
    let outcome = unsafe { uhmm_os_guarded(dst, src, len) };
    if outcome.failed == 0 { Ok(()) } else { Err(outcome.address) }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Copy = unsafe fn(*mut u8, *const u8, usize);

    unsafe fn guarded_ok(dst: *mut u8, src: *const u8, len: usize) {
        // SAFETY: handed on.
        unsafe { guarded(dst, src, len) }.unwrap();
    }

    /// Every alignment of both sides and every length around the loops' edges, with bytes beyond left alone.
    #[test]
    fn any_alignment_and_length() {
        let src: Vec<u8> = (0..2048u32).map(|i| (i * 7 + i / 256 + 1) as u8).collect();
        for copy in [stream as Copy, guarded_ok] {
            for to in [0, 1, 15, 16, 31, 33, 63, 64] {
                for from in [0, 1, 8, 17, 63] {
                    for len in (0..300).chain([511, 512, 513, 1000]) {
                        let mut dst = vec![0xEEu8; 1200];
                        // SAFETY: both vectors are larger than the ranges.
                        unsafe { copy(dst.as_mut_ptr().add(to), src.as_ptr().add(from), len) };
                        assert_eq!(&dst[to..to + len], &src[from..from + len], "to {to} from {from} len {len}");
                        assert!(dst[..to].iter().chain(&dst[to + len..]).all(|&b| b == 0xEE), "to {to} len {len}");
                    }
                }
            }
        }
    }

    #[test]
    fn zeros() {
        for to in [0, 1, 15, 16, 63, 64] {
            for len in (0..300).chain([511, 512, 513, 1000]) {
                let mut dst = vec![0xEEu8; 1200];
                // SAFETY: the vector is larger than the range.
                unsafe { stream_zero(dst.as_mut_ptr().add(to), len) };
                assert!(dst[to..to + len].iter().all(|&b| b == 0), "to {to} len {len}");
                assert!(dst[..to].iter().chain(&dst[to + len..]).all(|&b| b == 0xEE), "to {to} len {len}");
            }
        }
    }

    #[test]
    fn fixup_covers_the_loop_only() {
        let start = uhmm_os_guarded as *const () as usize;
        assert!(fixup(start).is_some() && fixup(start - 1).is_none());
        let end = uhmm_os_guarded_end as *const () as usize;
        assert!(fixup(end - 1).is_some() && fixup(end).is_none());
        assert!(fixup(uhmm_os_stream as *const () as usize).is_none());
    }
}
