//! OpenCL devices that fail, on order: what a copy, a launch or a lack of memory on the way means for the program, with OpenCL's name for it.

use crate::failing::touch;
use crate::harness::*;
use crate::opencl::Foreign;
use std::process::Command;
use uhmm::{Error, KernelFault, OpenCl, Uhmm, args, inout, inp, out};
use uhmm_core::args::Args;
use uhmm_core::kernel::Entry;
use uhmm_core::{CoreRef, DeviceConfig, DeviceRef};
use uhmm_faulty::{ALWAYS, Call, Fault, all_well, called, order, outstanding};

crate::tests![
    a_copy_to_the_device_fails,
    a_device_without_memory_in_the_middle_of_it,
    a_copy_from_the_device_fails,
    a_device_that_disappears,
    a_kernel_that_does_not_start,
    no_platform_and_no_loader,
];

const SOURCE: &str = "
__kernel void add_one(__global uint *data) { data[get_global_id(0)]++; }
__kernel void next(__global uint *r, __global const uint *a) { r[get_global_id(0)] = a[get_global_id(0)] + 1; }";

fn kernel(name: &'static str) -> Foreign {
    Foreign(OpenCl { source: SOURCE.into(), name: name.into(), local: [64, 1, 1], options: "".into() })
}

fn faulty(mib: usize) -> DeviceRef {
    let config = DeviceConfig { memory: mib << 20, ..DeviceConfig::new("opencl") };
    CoreRef::get().unwrap().device(config, uhmm_faulty::around(uhmm_opencl::open_with_copies)).unwrap()
}

fn run(dev: &DeviceRef, name: &'static str, items: usize, args: Args<'_>) -> Result<(), Error> {
    dev.run(Entry::new(&kernel(name)), (items / 64).into(), &args)
}

fn add_one(dev: &DeviceRef, data: &mut [u32]) -> Result<(), Error> {
    run(dev, "add_one", data.len(), args![inout(data)])
}

fn numbers(from: u32, count: usize) -> Vec<u32> {
    (from..).take(count).collect()
}

fn is(data: &[u32], first: u32) -> bool {
    data.iter().enumerate().all(|(i, &x)| x == first + i as u32)
}

/// Each batch in turn: the launch fails with the name of the status, all is as before, and the next one is right.
fn a_copy_to_the_device_fails() {
    let dev = faulty(32);
    called("CL_OUT_OF_RESOURCES");
    let (mut a, b, mut r) = (numbers(0, 1 << 20), numbers(7, 1 << 20), vec![0; 1 << 20]);
    let mut failures = 0;
    for nth in 1.. {
        dev.evict(0, 1 << 47).unwrap();
        let first = a[0];
        order(Call::ToDevice, Fault::Failed, nth, 2);
        let results = [add_one(&dev, &mut a), run(&dev, "next", 1 << 20, args![out(&mut r), inp(&b)])];
        let struck = outstanding(Call::ToDevice) < 2;
        all_well();
        if !struck {
            assert!(results.iter().all(Result::is_ok));
            break;
        }
        for error in results.iter().filter_map(|result| result.as_ref().err()) {
            failures += 1;
            assert!(matches!(error, Error::Driver { device: "opencl", said: Some("CL_OUT_OF_RESOURCES"), .. }), "{error:?}");
            assert!(error.to_string().contains("CL_OUT_OF_RESOURCES"), "{error}");
        }
        assert!(is(&a, first + u32::from(results[0].is_ok())) && is(&b, 7), "batch {nth}");
        assert!(results[1].is_err() || is(&r, 8), "batch {nth}");
        r.fill(0);
        add_one(&dev, &mut a).unwrap();
        run(&dev, "next", 1 << 20, args![out(&mut r), inp(&b)]).unwrap();
        assert!(is(&a, first + 1 + u32::from(results[0].is_ok())) && is(&r, 8), "batch {nth}: the next launches are right");
    }
    assert!(failures > 1 && dev.stats().pages_lost == 0, "{failures}");
}

/// The device has no memory for a part of what a launch needs.
fn a_device_without_memory_in_the_middle_of_it() {
    let dev = faulty(32);
    let mut data = numbers(0, 4 << 20);
    for nth in 1..10 {
        dev.evict(0, 1 << 47).unwrap();
        order(Call::Populate, Fault::Failed, nth, ALWAYS);
        let first = data[0];
        match add_one(&dev, &mut data) {
            Ok(()) => assert!(is(&data, first + 1), "unit {nth}"),
            Err(Error::NoRoom { device: "opencl", .. }) => assert!(is(&data, first), "unit {nth}"),
            Err(error) => panic!("{error}"),
        }
    }
    assert!(outstanding(Call::Populate) == ALWAYS);
    all_well();
    let first = data[0];
    add_one(&dev, &mut data).unwrap();
    assert!(is(&data, first + 1) && dev.stats().pages_lost == 0);
}

/// Once, and it is asked for again; for ever, and the pages are lost: never wrong data.
fn a_copy_from_the_device_fails() {
    let dev = faulty(32);
    let mut memory = Pages::new(8 << 20);
    let data = memory.slice::<u32>();
    data.iter_mut().zip(0..).for_each(|(x, i)| *x = i);
    for round in 1..6 {
        add_one(&dev, data).unwrap();
        order(Call::ToHost, Fault::Failed, round, 1);
        dev.evict(0, 1 << 47).unwrap();
        assert!(is(data, round), "round {round}");
        assert!(outstanding(Call::ToHost) == 0 || round > 3, "round {round}");
        all_well();
    }
    add_one(&dev, data).unwrap();
    order(Call::ToHost, Fault::Failed, 1, ALWAYS);
    let error = dev.evict(data.as_ptr() as usize, data.as_ptr() as usize + 4096).unwrap_err();
    assert!(matches!(error, Error::PagesLost { device: "opencl", .. }), "{error}");
    assert_eq!(touch(&data[5]), Some(libc::SIGBUS));
    all_well();
    // What was not asked for in vain is there.
    let kept = data.len() - 1;
    assert!(touch(&data[kept]) == Some(libc::SIGBUS) || data[kept] == 6 + kept as u32);
}

/// In a copy to it, in one from it, in a kernel, or between two calls: what the program has stays, what only the device had raises SIGBUS, and a new device of that name is as any.
fn a_device_that_disappears() {
    called("CL_DEVICE_NOT_AVAILABLE");
    for call in [Call::ToDevice, Call::ToHost, Call::Launch] {
        let dev = faulty(64);
        let mut memory = Pages::new(8 << 20);
        let away = memory.slice::<u32>();
        let (read, mut other) = (numbers(0, away.len()), numbers(3, 1 << 20));
        run(&dev, "next", read.len(), args![out(away), inp(&read)]).unwrap();
        assert!(pages_present(away) < 20);
        order(call, Fault::Lost, 1, ALWAYS);
        let error = match call {
            Call::ToHost => dev.evict(away.as_ptr() as usize, away.as_ptr() as usize + 4096).unwrap_err(),
            _ => add_one(&dev, &mut other).unwrap_err(),
        };
        let said = matches!(error, Error::DeviceLost { device: "opencl", said: Some("CL_DEVICE_NOT_AVAILABLE"), .. });
        assert!(said || (call == Call::ToHost && matches!(error, Error::PagesLost { .. })), "{call:?}: {error}");
        let error = add_one(&dev, &mut numbers(0, 1 << 16)).unwrap_err();
        assert!(matches!(error, Error::DeviceLost { .. }) && error.to_string().contains("CL_DEVICE_NOT_AVAILABLE"), "{call:?}: {error}");
        all_well();
        assert!(is(&read, 0), "{call:?}: what both had is the program's");
        assert_eq!(touch(&away[1_000_000]), Some(libc::SIGBUS), "{call:?}: what only the device had is gone");
        if call == Call::ToDevice {
            assert!(is(&other, 3), "what had not left is there");
        }
        assert!(dev.stats().pages_lost > 2000, "{call:?}");
        drop(dev);
        let dev = faulty(64);
        let mut again = numbers(0, 1 << 20);
        add_one(&dev, &mut again).unwrap();
        assert!(is(&again, 1), "{call:?}");
    }
}

/// A launch that OpenCL refuses, for real and on order.
fn a_kernel_that_does_not_start() {
    let dev = faulty(32);
    called("CL_OUT_OF_RESOURCES");
    let mut data = numbers(0, 1 << 20);
    order(Call::Launch, Fault::Failed, 1, 1);
    let error = add_one(&dev, &mut data).unwrap_err();
    assert!(matches!(error, Error::Driver { said: Some("CL_OUT_OF_RESOURCES"), .. }), "{error}");
    all_well();
    data = numbers(0, 1 << 20);
    let large = Foreign(OpenCl { local: [1 << 20, 1, 1], ..kernel("add_one").0 });
    let error = dev.run(Entry::new(&large), 1.into(), &args![inout(&mut data)]).unwrap_err();
    assert!(matches!(error, Error::Kernel(KernelFault::Refused(_))) && error.to_string().contains("CL_INVALID_WORK"), "{error}");
    assert!(is(&data, 0));
    add_one(&dev, &mut data).unwrap();
    assert!(is(&data, 1));
}

/// What is missing is said, with what to install: in processes that find no driver, or no loader.
fn no_platform_and_no_loader() {
    const ASK: &str = "UHMM_TEST_ASK_OPENCL";
    if std::env::var_os(ASK).is_some() {
        let hmm = Uhmm::new().unwrap();
        println!("devices {}, {}", uhmm::opencl_devices().len(), hmm.device("opencl").unwrap_err());
        let mut data = numbers(0, 1000);
        hmm.device("soft").unwrap().run(&increment, 1, args![inout(&mut data)]).unwrap();
        assert!(is(&data, 1), "the other devices are there");
        return;
    }
    let told = |environment: &dyn Fn(&mut Command)| {
        let mut command = again("suite::opencl_failing::no_platform_and_no_loader");
        command.env(ASK, "1");
        environment(&mut command);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let empty = tempfile::tempdir().unwrap();
    let no_platform = told(&|command| {
        command.env("OCL_ICD_VENDORS", empty.path());
    });
    assert!(
        no_platform.contains("devices 0") && no_platform.contains("CL_PLATFORM_NOT_FOUND_KHR") && no_platform.contains("pocl-opencl-icd"),
        "{no_platform}"
    );
    // A library of that name which is none stands before the loader.
    std::fs::write(empty.path().join("libOpenCL.so.1"), "no library").unwrap();
    let no_loader = told(&|command| {
        command.env("LD_LIBRARY_PATH", empty.path());
    });
    assert!(no_loader.contains("devices 0") && no_loader.contains("ocl-icd-libopencl1"), "{no_loader}");
}
