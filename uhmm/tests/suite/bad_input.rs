//! Errors that are found before a kernel starts, and leave everything as it was.

use crate::harness::*;
use std::any::TypeId;
use uhmm::{Access, Arg, Args, Ctx, Error, Uhmm, args, inout, inp, out};
use uhmm_core::args::RawArg;

pub const TESTS: &[Test] = &[
    Test { name: "suite::bad_input::ranges", run: ranges, full: true },
    Test { name: "suite::bad_input::overlap", run: overlap, full: true },
    Test { name: "suite::bad_input::too_large", run: too_large, full: true },
    Test { name: "suite::bad_input::devices", run: devices, full: true },
    Test { name: "suite::bad_input::without_rights_the_error_says_what_gives_them", run: rights, full: false },
];

/// # Safety
/// The launch is refused, or its kernel does not look at the argument.
unsafe fn raw(start: usize, count: usize, access: Access) -> Arg<'static> {
    let raw = RawArg::Slice { start, count, size: 4, ty: TypeId::of::<u32>(), name: "u32", access, device: None };
    // SAFETY: what is not there, or not the argument's alone, nobody uses: the caller says so.
    unsafe { Arg::from_raw(raw) }
}

fn never(_: &Ctx<'_>) {
    unreachable!("the kernel must not start");
}

fn ranges() {
    let (_hmm, dev) = device(16);
    let mut good = vec![1u32; 1_000_000];
    let there = pages_present(&good);
    let mut refused = |(start, count, access), words: &[&str]| {
        // SAFETY: if it is not refused, the test ends with a panic.
        let arg = unsafe { raw(start, count, access) };
        let error = dev.run(&never, 1, Args::new([inout(&mut good), arg])).unwrap_err();
        let text = error.to_string();
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
        assert_eq!(pages_present(&good), there, "nothing has moved: {text}");
        assert!(text.chars().next().unwrap().is_lowercase());
    };
    refused((0, 5, Access::In), &["argument 1 is a null pointer", "20 bytes"]);
    let mut pages = Pages::new(3 << 20);
    pages.slice::<u32>().fill(4);
    let start = pages.start() as usize;
    // SAFETY: only launches that are refused use it before something is mapped there again.
    unsafe { pages.unmap(1 << 20, 1 << 20) };
    // SAFETY: inside `pages`, of which the program uses nothing before it may again.
    let protect = |start: usize, len, access| assert_eq!(unsafe { libc::mprotect(start as *mut _, len, access) }, 0);
    refused((start + (1 << 20), 10, Access::In), &["not mapped", &format!("{:#x}", start + (1 << 20))]);
    refused((start, 3 << 18, Access::Out), &["not mapped", &format!("{:#x}", start + (1 << 20))]);
    refused((start + 8, usize::MAX / 2, Access::In), &["beyond the address space"]);
    refused((usize::MAX - 3, 1, Access::In), &["beyond the address space"]);
    refused((0xffff_8000_0000_0000, 1, Access::In), &["beyond the address space"]);
    refused((0x3000_0000_0000, 4, Access::In), &["no address for it"]);
    protect(start, 4096, libc::PROT_READ);
    refused((start, 1 << 18, Access::Out), &["written", "read-only", &format!("{start:#x}")]);
    refused((start, 1 << 18, Access::InOut), &["written", "read-only"]);
    protect(start + 4096, 4096, libc::PROT_NONE);
    refused((start, 1 << 18, Access::In), &["read", "not readable", &format!("{:#x}", start + 4096)]);
    protect(start, 8192, libc::PROT_READ | libc::PROT_WRITE);
    // SAFETY: the hole is the place of `pages`, of which no slice is borrowed.
    unsafe { map_at(start + (1 << 20), 1 << 20, libc::MAP_FIXED) };
    assert!(pages.slice::<u32>()[..1 << 18].iter().all(|&x| x == 4));
    // Nothing at all is fine.
    dev.run(&|_: &Ctx<'_>| (), 1, args![inp::<u32>(&[]), out::<u32>(&mut [])]).unwrap();
    assert!(matches!(dev.run(&never, 0, args![]), Err(Error::Grid(_))));
    assert!(matches!(dev.run(&never, [usize::MAX, 2], args![]), Err(Error::Grid(_))));
}

fn overlap() {
    let (_hmm, dev) = device(16);
    let mut data = vec![1u32; 100_000];
    let start = data.as_mut_ptr() as usize;
    let there = pages_present(&data);
    for (a, b) in [(Access::Out, Access::In), (Access::In, Access::InOut), (Access::Out, Access::Out)] {
        // SAFETY: if it is not refused, the test ends with a panic.
        let list = unsafe { Args::new([raw(start, 50_001, a), raw(start + 200_000, 50_000, b)]) };
        let error = dev.run(&never, 1, list).unwrap_err();
        assert_eq!(error.to_string(), format!("arguments 0 and 1 overlap at {:#x} and one of them is written", start + 200_000));
    }
    assert_eq!(pages_present(&data), there);
    // Neighbours do not overlap, and two readers may.
    // SAFETY: the kernel looks at nothing.
    let list = unsafe { Args::new([raw(start, 50_000, Access::Out), raw(start + 200_000, 50_000, Access::In)]) };
    dev.run(&|_: &Ctx<'_>| (), 1, list).unwrap();
    dev.run(&|_: &Ctx<'_>| (), 1, args![inp(&data), inp(&data[5..])]).unwrap();
}

fn too_large() {
    let (_hmm, dev) = device(8);
    let mut data = vec![1u32; 3 << 20];
    let there = pages_present(&data);
    let error = dev.run(&never, 1, args![inout(&mut data)]).unwrap_err();
    assert!(matches!(error, Error::TooLarge { capacity: 0x80_0000, .. }));
    let text = error.to_string();
    assert!(text.contains("8388608") && text.contains("declares"), "{text}");
    assert_eq!(pages_present(&data), there);
    let _most = dev.alloc::<u8>(6 << 20).unwrap();
    assert!(matches!(dev.run(&never, 1, args![inout(&mut data[..1 << 20])]), Err(Error::NoRoom { .. })));
    assert!(data.iter().all(|&x| x == 1));
}

fn devices() {
    let (hmm, dev) = device(8);
    let error = hmm.device("gpu9").unwrap_err();
    assert_eq!(error.to_string(), "no such device: \"gpu9\" (there is: soft, soft:nofault, soft:coherent, opencl, null)");
    let other = hmm.soft("other").memory(8 << 20).open().unwrap();
    let buffer = other.alloc::<u32>(4).unwrap();
    assert!(matches!(dev.run(&never, 1, args![buffer.inp()]), Err(Error::OtherDevice { index: 0 })));
    assert!(matches!(hmm.soft("huge").memory(usize::MAX).open(), Err(Error::Device { .. })));
    assert!(matches!(hmm.soft("tiny").memory(5).open(), Err(Error::Device { .. })));
    assert!(matches!(hmm.soft("many").threads(100_000).open(), Err(Error::Device { .. })));
    dev.run(&|_: &Ctx<'_>| (), 1, args![]).unwrap();
}

fn rights() {
    if is_root() {
        // As root: become nobody, without capabilities.
        // SAFETY: they have numbers only.
        assert_eq!(unsafe { libc::setresgid(65534, 65534, 65534) | libc::setresuid(65534, 65534, 65534) }, 0);
    }
    // SAFETY: no other thread is there.
    unsafe { std::env::set_var(uhmm::Mode::VARIABLE, "full") };
    match Uhmm::new() {
        Err(error) => {
            let text = error.to_string();
            assert!(matches!(error, Error::NoUserfaultfd(_)), "{text}");
            let words = ["vm.unprivileged_userfaultfd", "CAP_SYS_PTRACE", "/dev/userfaultfd"];
            assert!(words.iter().all(|word| text.contains(word)), "{text}");
        }
        // The administrator has given the right to everybody.
        Ok(_) => assert_eq!(std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap().trim(), "1"),
    }
}
