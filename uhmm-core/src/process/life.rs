//! The beginning and the end of the core and of its devices: which thread is started by whom, and what goes in which order.
//!
//! All of it runs on the keeper, whose descriptor table the other threads share, or asks it.

#![allow(unsafe_code)] // memory that is shared with threads until they are joined

use super::*;
use crate::ahead;
use crate::core::{CURRENT, NONE, OWNER};
use crate::device_fault;
use crate::fork;
use crate::lease;
use crate::monitor::Monitor;
use crate::port::huge;
use uhmm_os::{signal, system};

pub(super) fn no_thread(e: Errno) -> Error {
    match e {
        Errno::NOMEM => Error::System("reserve address space (limited by RLIMIT_AS or vm.overcommit_memory=2)", e),
        e => Error::System("start a thread", e),
    }
}

/// Starts the keeper, which starts the rest.
pub(super) fn start() -> Result<Running, Error> {
    system::pin_library(start as *const () as usize);
    fork::register().map_err(|e| Error::System("register fork handlers", e))?;
    let desk = Desk::new()
        .and_then(|desk| OwnBox::new(c"uhmm desk", desk))
        .map_err(|e| Error::System("reserve address space (limited by RLIMIT_AS or vm.overcommit_memory=2)", e))?;
    /// # Safety
    /// The argument is a `&Desk` that outlives the thread.
    unsafe extern "C" fn keep(desk: *mut ()) {
        // SAFETY: by the contract.
        unsafe { &*desk.cast::<Desk>() }.serve(&());
    }
    // SAFETY: the desk is joined before it is dropped, in `end` or below.
    let keeper = unsafe { own::spawn(c"uhmm-keeper", STACK, keep, (&raw const *desk).cast_mut().cast()) };
    let keeper = keeper.map_err(no_thread)?;
    // SAFETY: the keeper serves with ().
    let started = unsafe { desk.ask(|(): &()| start_core()) }.unwrap_or(Err(Error::System("reach the keeper", Errno::SRCH)));
    match started {
        Ok((core, monitor, assistant)) => Ok(Running {
            core,
            desk,
            keeper,
            monitor,
            assistant,
            evictor: None,
            prefetcher: None,
            queues: [const { None }; MAX_DEVICES],
            users: 0,
            device_users: [0; MAX_DEVICES],
            end,
        }),
        Err(e) => {
            desk.close();
            keeper.join();
            Err(e)
        }
    }
}

/// On the keeper.
fn start_core() -> Result<(OwnBox<Core>, Thread, Thread), Error> {
    thread::unshare_files().map_err(|e| Error::System("get a descriptor table of its own", e))?;
    let core = OwnBox::new(c"uhmm core", Core::new()?)
        .map_err(|e| Error::System("reserve address space (limited by RLIMIT_AS or vm.overcommit_memory=2)", e))?;
    struct Post {
        core: *const Core,
        monitor: Monitor,
    }
    /// # Safety
    /// The argument is a leaked `Post`, whose core outlives the thread.
    unsafe extern "C" fn monitor(post: *mut ()) {
        // SAFETY: by the contract; the box is this thread's now.
        let mut post = unsafe { OwnBox::<Post>::reclaim(post.cast()) }.into_inner();
        // SAFETY: by the contract.
        let core = unsafe { &*post.core };
        post.monitor.run(core, &core.stop);
    }
    let reserve = |e| Error::System("reserve address space (limited by RLIMIT_AS or vm.overcommit_memory=2)", e);
    let post = Post { core: &raw const *core, monitor: Monitor::new().map_err(reserve)? };
    let argument = OwnBox::new(c"uhmm monitor", post).map_err(reserve)?.leak().cast();
    // SAFETY: the core is dropped after the monitor was joined, in `end`.
    let monitor = unsafe { own::spawn(c"uhmm-monitor", STACK, monitor, argument) }.map_err(no_thread)?;
    let assistant = match start_assistant(&core) {
        Ok(assistant) => assistant,
        Err(e) => {
            let _ = core.stop.signal();
            monitor.join();
            return Err(no_thread(e));
        }
    };
    OWNER.store(std::process::id(), Ordering::Release);
    CURRENT.store(&raw const *core as usize, Ordering::Release);
    if let Err(e) = signal::install(device_fault::on_signal) {
        CURRENT.store(NONE, Ordering::Release);
        core.assist.close();
        assistant.join();
        let _ = core.stop.signal();
        monitor.join();
        return Err(Error::System("install a signal handler", e));
    }
    Ok((core, monitor, assistant))
}

/// The core must outlive the thread.
fn start_assistant(core: &Core) -> Result<Thread, Errno> {
    /// # Safety
    /// The argument is a `&Core` that outlives the thread.
    unsafe extern "C" fn assist(at: *mut ()) {
        // SAFETY: by the contract.
        let core = unsafe { &*at.cast::<Core>() };
        core.assist.serve(|| {
            lease::work(core);
            huge::work(core);
            ahead::work(core);
        });
    }
    // SAFETY: the core is dropped after the assistant was joined, in `end`.
    unsafe { own::spawn(c"uhmm-assistant", STACK, assist, core::ptr::from_ref(core).cast_mut().cast()) }
}

/// On the keeper: opens a device and starts its queue.
pub(super) fn open_device(core: &'static Core, config: DeviceConfig, open: OpenDriver) -> Result<(usize, [Thread; 2]), Error> {
    system::pin_library(open as *const () as usize);
    let Some(index) = core.devices.free() else {
        return Err(Error::Device { name: config.name.into(), why: format!("there are {MAX_DEVICES} already") });
    };
    let mut others = vec![];
    core.for_each_device(|dev| others.push(dev.driver.info().clone()));
    let driver = open(&config, core.space.mode, &others)?;
    let dev = OwnBox::new(c"uhmm device", Device::new(index, driver, config.fence_limit)?)
        .map_err(|e| Error::System("reserve address space (limited by RLIMIT_AS or vm.overcommit_memory=2)", e))?;
    let start = || -> Result<Thread, Error> {
        let seat = OwnBox::new(c"uhmm seat", Seat { core, dev: (&raw const *dev).cast_mut() })
            .map_err(|e| Error::System("reserve address space (limited by RLIMIT_AS or vm.overcommit_memory=2)", e))?
            .leak();
        /// # Safety
        /// The argument is a leaked `Seat`.
        unsafe extern "C" fn queue(seat: *mut ()) {
            // SAFETY: by the contract; the box is this thread's now.
            let seat = unsafe { OwnBox::<Seat>::reclaim(seat.cast()) };
            seat.dev().desk().serve(&*seat);
        }
        // SAFETY: the device is dropped after its queues were joined: below, in `close_unused`, or in `end`.
        unsafe { own::spawn(c"uhmm-queue", STACK, queue, seat.cast()) }.map_err(|e| {
            // SAFETY: leaked above, and no thread has it.
            drop(unsafe { OwnBox::reclaim(seat) });
            no_thread(e)
        })
    };
    let first = start()?;
    let second = match start() {
        Ok(second) => second,
        Err(e) => {
            dev.desk().close();
            first.join();
            return Err(e);
        }
    };
    core.devices.set(index, dev);
    Ok((index, [first, second]))
}

/// Everything comes home, threads end, memory goes.
fn end(running: Running) {
    let Running { core, desk, keeper, queues, monitor, assistant, evictor, prefetcher, .. } = running;
    core.prefetches.stop();
    if let Some(prefetcher) = prefetcher {
        prefetcher.join();
    }
    core.for_each_device(|dev| dev.desk().close());
    queues.into_iter().flatten().flatten().for_each(Thread::join);
    core.assist.close();
    assistant.join();
    if let Some(evictor) = evictor {
        evictor.end();
    }
    let at = &raw const *core as usize;
    // SAFETY: the keeper serves with (), and the core outlives the question. Bringing pages home needs uhmm's descriptors, and the monitor.
    unsafe {
        desk.ask(move |(): &()| {
            let core = &*(at as *const Core);
            core.for_each_device(|dev| lease::abandon(core, dev));
            core.evict_all();
            (0..MAX_DEVICES).for_each(|index| drop(core.devices.take(index)));
            let _ = core.stop.signal();
        })
    };
    signal::uninstall();
    CURRENT.store(NONE, Ordering::Release);
    monitor.join();
    // The core's descriptors are in the keeper's table: it must close them.
    // SAFETY: the keeper serves with ().
    unsafe { desk.ask(move |(): &()| drop(core)) };
    desk.close();
    keeper.join();
}
