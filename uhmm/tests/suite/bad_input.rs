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

fn raw(start: usize, count: usize, access: Access) -> Arg<'static> {
    let raw = RawArg::Slice { start, count, size: 4, ty: TypeId::of::<u32>(), name: "u32", access, device: None };
    unsafe { Arg::from_raw(raw) }
}

fn never(_: &Ctx<'_>) {
    unreachable!("the kernel must not start");
}

fn ranges() {
    let (_hmm, dev) = device(16);
    let mut good = vec![1u32; 1_000_000];
    let there = pages_present(&good);
    let mut refused = |arg: Arg<'_>, words: &[&str]| {
        let error = dev.run(&never, 1, Args::new([inout(&mut good), arg])).unwrap_err();
        let text = error.to_string();
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
        assert_eq!(pages_present(&good), there, "nothing has moved: {text}");
        assert!(text.chars().next().unwrap().is_lowercase());
    };
    refused(raw(0, 5, Access::In), &["argument 1 is a null pointer", "20 bytes"]);
    let mut pages = Pages::new(3 << 20);
    pages.slice::<u32>().fill(4);
    let start = pages.start as usize;
    unsafe { libc::munmap((start + (1 << 20)) as *mut _, 1 << 20) };
    refused(raw(start + (1 << 20), 10, Access::In), &["not mapped", &format!("{:#x}", start + (1 << 20))]);
    refused(raw(start, 3 << 18, Access::Out), &["not mapped", &format!("{:#x}", start + (1 << 20))]);
    refused(raw(start + 8, usize::MAX / 2, Access::In), &["beyond the address space"]);
    refused(raw(usize::MAX - 3, 1, Access::In), &["beyond the address space"]);
    refused(raw(0xffff_8000_0000_0000, 1, Access::In), &["beyond the address space"]);
    refused(raw(0x3000_0000_0000, 4, Access::In), &["no address for it"]);
    unsafe { libc::mprotect(start as *mut _, 4096, libc::PROT_READ) };
    refused(raw(start, 1 << 18, Access::Out), &["written", "read-only", &format!("{start:#x}")]);
    refused(raw(start, 1 << 18, Access::InOut), &["written", "read-only"]);
    unsafe { libc::mprotect((start + 4096) as *mut _, 4096, libc::PROT_NONE) };
    refused(raw(start, 1 << 18, Access::In), &["read", "not readable", &format!("{:#x}", start + 4096)]);
    unsafe { libc::mprotect(start as *mut _, 8192, libc::PROT_READ | libc::PROT_WRITE) };
    assert!(pages.slice::<u32>()[..1 << 18].iter().all(|&x| x == 4));
    unsafe { libc::mmap((start + (1 << 20)) as *mut _, 1 << 20, 3, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED, -1, 0) };
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
        let list = Args::new([raw(start, 50_001, a), raw(start + 200_000, 50_000, b)]);
        let error = dev.run(&never, 1, list).unwrap_err();
        assert_eq!(error.to_string(), format!("arguments 0 and 1 overlap at {:#x} and one of them is written", start + 200_000));
    }
    assert_eq!(pages_present(&data), there);
    // Neighbours do not overlap, and two readers may.
    dev.run(&|_: &Ctx<'_>| (), 1, Args::new([raw(start, 50_000, Access::Out), raw(start + 200_000, 50_000, Access::In)])).unwrap();
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
    assert_eq!(error.to_string(), "no such device: \"gpu9\" (there is: soft, soft:nofault, soft:coherent, null)");
    let other = hmm.soft("other").memory(8 << 20).open().unwrap();
    let buffer = other.alloc::<u32>(4).unwrap();
    assert!(matches!(dev.run(&never, 1, args![buffer.inp()]), Err(Error::OtherDevice { index: 0 })));
    assert!(matches!(hmm.soft("huge").memory(usize::MAX).open(), Err(Error::Device { .. })));
    assert!(matches!(hmm.soft("tiny").memory(5).open(), Err(Error::Device { .. })));
    assert!(matches!(hmm.soft("many").threads(100_000).open(), Err(Error::Device { .. })));
    dev.run(&|_: &Ctx<'_>| (), 1, args![]).unwrap();
}

fn rights() {
    if unsafe { libc::geteuid() } == 0 {
        // As root: become nobody, without capabilities.
        assert_eq!(unsafe { libc::setresgid(65534, 65534, 65534) }, 0);
        assert_eq!(unsafe { libc::setresuid(65534, 65534, 65534) }, 0);
    }
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
