//! A library that was linked with a copy of uhmm, as a plugin of some program would be. The tests load it twice beside their own copy.
#![allow(unsafe_code)] // a C interface

use uhmm::{Ctx, Device, Uhmm, args, inout};

/// What the library holds between calls.
#[derive(Debug)]
pub struct Held {
    hmm: Uhmm,
    dev: Device,
}

/// Opens uhmm and the device "soft"; null if that fails.
#[unsafe(no_mangle)]
pub extern "C" fn plugin_open() -> *mut Held {
    let open = || {
        let hmm = Uhmm::new().ok()?;
        let dev = hmm.device("soft").ok()?;
        Some(Box::into_raw(Box::new(Held { hmm, dev })))
    };
    open().unwrap_or(std::ptr::null_mut())
}

/// Adds 1 to each of `len` numbers on the device: the number of open devices, or 0 if it failed.
///
/// # Safety
/// `held` comes from [`plugin_open`]; the numbers are the caller's to write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn plugin_add(held: *mut Held, data: *mut u32, len: usize) -> usize {
    // SAFETY: by the contract.
    let (held, data) = unsafe { (&*held, std::slice::from_raw_parts_mut(data, len)) };
    let kernel = |ctx: &Ctx<'_>| ctx.out::<u32>(0).chunk(1000).iter_mut().for_each(|x| *x += 1);
    match held.dev.run(&kernel, len.div_ceil(1000), args![inout(data)]) {
        Ok(()) => held.hmm.open_devices().len(),
        Err(_) => 0,
    }
}

/// Lets go.
///
/// # Safety
/// `held` comes from [`plugin_open`], once.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn plugin_close(held: *mut Held) {
    // SAFETY: by the contract.
    drop(unsafe { Box::from_raw(held) });
}
