//! The device's memory: one buffer for as long as the device is open, so that nothing is allocated, or touched for the first time, when a block comes; and a queue of its own as the copy engine.
//!
//! A batch is enqueued in as few calls as will do (`pieces`) without waiting, and waited for as a whole. Pieces from memory of the program, which may be gone, pass through
//! memory of this driver: the runtime must not touch what can vanish under it.
//!
//! No example: a part of the device; outside, only [`crate::open`] is used.
#![allow(unsafe_code)] // copies by way of raw addresses

use crate::api::{self, Buffer, Device, Queue, Status, Undone};
use crate::pieces::{self, Op, Rectangles, at, is_guarded};
use crate::ranges::Ranges;
use crate::stage::{self, Stage, Stages};
use core::ops::Range;
use core::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use core::time::Duration;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use uhmm_core::driver::{Dma, DmaError, DmaKind, Fence, Frame};
use uhmm_os::{PAGE, copy};

/// Where the device's addresses begin, so that none is that of nothing.
const BASE: usize = 1 << 46;
/// Bytes of the program's memory that are copied at a time.
const STAGE: usize = 1 << 20;

/// The device's address of a frame.
pub(crate) fn address(frame: Frame) -> usize {
    BASE + frame as usize * PAGE
}

/// The offset in the buffer of a device address from [`address`].
pub(crate) fn offset(address: usize) -> usize {
    address - BASE
}

/// The memory of one device.
#[derive(Debug)]
pub struct Memory {
    buffer: Buffer,
    /// Two, which take batches in turn: what one of them waits for, the other need not.
    copies: [Queue; 2],
    next: AtomicUsize,
    /// What the next kernel comes after, which stands in the queue for kernels before it.
    ahead: Mutex<Vec<Batch>>,
    /// Whether the device takes rectangles: until it has failed at one whose pieces it then copied one by one.
    takes_rectangles: AtomicBool,
    stages: Stages,
    ranges: Ranges,
    device: Device,
    health: Health,
}

/// How the device is.
#[derive(Debug, Default)]
pub(crate) struct Health {
    lost: AtomicBool,
    /// The status of the last failure, if there was one.
    last: AtomicI32,
}

impl Health {
    /// Notes a failure.
    pub(crate) fn failed(&self, status: Status) {
        self.last.store(status.0, Ordering::Relaxed);
        if status.is_loss() {
            self.lost.store(true, Ordering::Release);
        }
    }

    /// What a copy's end means.
    fn of_copy(&self, undone: Undone) -> DmaError {
        match undone {
            Undone::Failed(status) => {
                self.failed(status);
                status.of_copy()
            }
            Undone::Late => {
                self.lost.store(true, Ordering::Release);
                DmaError::Lost
            }
        }
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// What OpenCL calls the last failure.
    pub(crate) fn said(&self) -> Option<&'static str> {
        let last = Status(self.last.load(Ordering::Relaxed));
        (last.0 != 0).then(|| last.name())
    }
}

/// What a fence stands for.
#[derive(Debug)]
struct Batch {
    /// The next kernel comes after it, and it is not waited for before.
    ahead: bool,
    /// For that time, which frames it uses.
    frames: Vec<Range<usize>>,
    events: Vec<api::Event>,
    result: Result<(), Status>,
    /// Whether rectangles are among it.
    rectangles: bool,
    /// What small pieces from and to memory of the program pass through, which may be gone, and such that lie apart: the device uses this instead.
    stage: Stage,
}

impl Memory {
    /// A buffer of so many bytes.
    ///
    /// # Errors
    /// The status of OpenCL.
    pub fn new(device: Device, bytes: usize) -> Result<Self, Status> {
        Ok(Memory {
            buffer: device.buffer(bytes)?,
            copies: [device.queue()?, device.queue()?],
            next: AtomicUsize::new(0),
            ahead: Mutex::default(),
            takes_rectangles: AtomicBool::new(true),
            stages: Stages::default(),
            ranges: Ranges::new(&device)?,
            device,
            health: Health::default(),
        })
    }

    /// The device whose memory it is.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What kernels follow stored pointers by.
    pub(crate) fn ranges(&self) -> &Ranges {
        &self.ranges
    }

    /// How the device is.
    pub(crate) fn health(&self) -> &Health {
        &self.health
    }

    /// The buffer.
    pub(crate) fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// Starts a batch.
    pub(crate) fn copy(&self, batch: &[Dma]) -> Fence {
        // What is not waited for is not asked for again, as rectangles are that the device cannot do.
        let started = self.start(batch, if is_ahead(batch) { Rectangles::Never } else { self.rectangles() });
        Fence(Box::into_raw(Box::new(started)) as u64)
    }

    fn rectangles(&self) -> Rectangles {
        match self.takes_rectangles.load(Ordering::Relaxed) {
            false => Rectangles::Never,
            true if self.device.by_rows() => Rectangles::Any,
            true => Rectangles::Packed,
        }
    }

    fn start(&self, batch: &[Dma], rectangles: Rectangles) -> Batch {
        let ahead = is_ahead(batch);
        let frames = if ahead { batch.iter().map(frames).collect() } else { vec![] };
        let stage = self.stages.take(pieces::ops(batch, rectangles));
        let mut started = Batch { ahead, frames, events: Vec::with_capacity(batch.len()), result: Ok(()), rectangles: false, stage };
        let queue = if ahead { self.device.kernels() } else { &self.copies[self.next.fetch_add(1, Ordering::Relaxed) % 2] };
        if !ahead {
            started.result = self.come_after(queue, batch);
        }
        for op in pieces::ops(batch, rectangles) {
            let (at, dma) = (at(&op.first), op.first);
            started.rectangles |= op.rows.count > 1;
            let host = match op.staged {
                false => dma.host as *mut u8,
                true if !stage::fits(&op) => continue, // when they are waited for
                true => match started.stage.enter(batch, &op) {
                    Some(place) => place,
                    None => continue,
                },
            };
            let event = match dma.kind {
                DmaKind::Zero => queue.zero(&self.buffer, at, dma.len),
                // SAFETY: the host's memory is uhmm's, or lent, and stays as it is until the batch has been waited for; or it is the stage, which lives as long, or for ever.
                DmaKind::ToHost | DmaKind::GuardedToHost => unsafe { queue.read_rows(&self.buffer, at, host, op.rows) },
                // SAFETY: as above.
                _ => unsafe { queue.write_rows(&self.buffer, at, host, op.rows) },
            };
            match event {
                Ok(event) => started.events.push(event),
                Err(status) => started.result = started.result.and(Err(status)),
            }
        }
        let flushed = queue.flush();
        started.result = started.result.and(flushed);
        started
    }

    /// Waits for a batch.
    ///
    /// # Errors
    /// As the contract says.
    pub(crate) fn wait(&self, fence: Fence, batch: &[Dma], limit: Duration) -> Result<(), DmaError> {
        let end = Instant::now() + limit;
        // SAFETY: `copy` made it, and every fence is waited for once.
        let mut started = unsafe { Box::from_raw(fence.0 as *mut Batch) };
        if started.ahead {
            let gone = started.stage.deliver(batch).map_or(Ok(()), |address| Err(DmaError::Gone { address }));
            let result = started.result.map_err(|status| self.health.of_copy(Undone::Failed(status))).and(gone);
            self.ahead().push(*started);
            return result;
        }
        let mut result = self.ended(*started, batch, end);
        for Op { first, .. } in pieces::ops(batch, Rectangles::Never).filter(|op| is_guarded(&op.first) && !stage::fits(op)) {
            // That the device failed counts for more than that something is gone.
            if result == Err(DmaError::Lost) {
                break;
            }
            result = match (result, self.by_stage(&first, limit)) {
                (Ok(()) | Err(DmaError::Gone { .. }), Err(failed @ (DmaError::Failed(_) | DmaError::Lost))) => Err(failed),
                (Ok(()), other) => other,
                (result, _) => result,
            };
        }
        result
    }

    /// Waits for what was started of a batch.
    fn ended(&self, mut started: Batch, batch: &[Dma], end: Instant) -> Result<(), DmaError> {
        let done = api::wait_until(&started.events, end).and(started.result.map_err(Undone::Failed));
        match done {
            Err(Undone::Late) => started.stage.leave(),
            // It may have been a rectangle that the device cannot do. What fails to go there fails a launch, so the pieces are asked for one by one before that is said.
            Err(Undone::Failed(status)) if started.rectangles && !status.is_loss() => {
                self.stages.put(started.stage);
                let result = self.ended(self.start(batch, Rectangles::Never), batch, end);
                if matches!(result, Ok(()) | Err(DmaError::Gone { .. })) {
                    self.takes_rectangles.store(false, Ordering::Relaxed);
                }
                return result;
            }
            _ => {
                let gone = done.is_ok().then(|| started.stage.deliver(batch)).flatten();
                self.stages.put(started.stage);
                if let Some(address) = gone {
                    return Err(DmaError::Gone { address });
                }
            }
        }
        done.map_err(|undone| self.health.of_copy(undone))
    }

    fn ahead(&self) -> MutexGuard<'_, Vec<Batch>> {
        self.ahead.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is put into a queue from now on comes after those batches that the next kernel comes after and that use the same frames; not after that kernel, which may run for long.
    fn come_after(&self, queue: &Queue, batch: &[Dma]) -> Result<(), Status> {
        let ahead = self.ahead();
        let meets = |used: &Range<usize>| batch.iter().map(frames).any(|mine| used.start < mine.end && mine.start < used.end);
        let events: Vec<&api::Event> =
            ahead.iter().filter(|ahead| ahead.frames.iter().any(meets)).flat_map(|ahead| &ahead.events).collect();
        if events.is_empty() { Ok(()) } else { queue.come_after(&events) }
    }

    /// Ends what the kernel that has just ended came after.
    ///
    /// # Errors
    /// The status of the first that failed.
    pub(crate) fn arrived(&self) -> Result<(), Status> {
        let ahead = core::mem::take(&mut *self.ahead());
        let mut events = ahead.iter().flat_map(|batch| &batch.events);
        if events.clone().any(|event| !event.has_ended())
            && let Err(status) = self.device.kernels().finish()
        {
            core::mem::forget(ahead); // the device may use it still
            return Err(status);
        }
        let result = events.try_for_each(api::Event::result);
        ahead.into_iter().for_each(|batch| self.stages.put(batch.stage));
        result
    }

    /// Starts copies to memory of uhmm's behind a kernel: an event of each.
    ///
    /// # Errors
    /// The first that the device does not take; what it took is waited for.
    pub(crate) fn read_behind(&self, pieces: &[Dma]) -> Result<Vec<api::Event>, Status> {
        let queue = self.device.kernels();
        let read = |dma: &Dma| {
            // SAFETY: the host's memory is uhmm's, and its owner waits for the launch.
            unsafe { queue.read(&self.buffer, at(dma), dma.host as *mut u8, dma.len) }
        };
        pieces.iter().map(read).collect::<Result<_, _>>().inspect_err(|_| {
            let _ = queue.finish();
        })
    }

    /// From or to memory of the program, which may be gone, by way of a stage.
    fn by_stage(&self, dma: &Dma, limit: Duration) -> Result<(), DmaError> {
        let mut stage = vec![0u8; STAGE.min(dma.len)];
        let mut result = Ok(());
        self.come_after(&self.copies[0], &[*dma]).map_err(|status| self.health.of_copy(Undone::Failed(status)))?;
        for done in (0..dma.len).step_by(STAGE) {
            let (at, host, len) = (at(dma) + done, dma.host + done, STAGE.min(dma.len - done));
            let done = |started: Result<api::Event, Status>| {
                api::wait_until(&[started.map_err(Undone::Failed)?], Instant::now() + limit) // the program's memory may take its time
            };
            // SAFETY: the stage is long enough, and lives until what uses it has been waited for; the program's memory may be anything.
            let reached = unsafe {
                if dma.kind != DmaKind::GuardedToHost {
                    let read = copy::guarded(stage.as_mut_ptr(), host as *const u8, len);
                    if read.is_ok() {
                        done(self.copies[0].write(&self.buffer, at, stage.as_ptr(), len))
                            .map_err(|undone| self.unfinished(undone, &mut stage))?;
                    }
                    read
                } else {
                    done(self.copies[0].read(&self.buffer, at, stage.as_mut_ptr(), len))
                        .map_err(|undone| self.unfinished(undone, &mut stage))?;
                    copy::guarded(host as *mut u8, stage.as_ptr(), len)
                }
            };
            result = result.and(reached.map_err(|address| DmaError::Gone { address }));
        }
        result
    }

    /// A copy by way of a stage that is not done: what the device may use still stays where it is.
    fn unfinished(&self, undone: Undone, stage: &mut Vec<u8>) -> DmaError {
        if undone == Undone::Late {
            core::mem::forget(core::mem::take(stage));
        }
        self.health.of_copy(undone)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _ = self.arrived(); // of a launch that came to nothing
    }
}

/// The bytes of the device's memory that a piece uses.
fn frames(dma: &Dma) -> Range<usize> {
    at(dma)..at(dma) + dma.len
}

/// Whether the kernel that comes next is all that waits for a batch: small snapshots of a launch.
fn is_ahead(batch: &[Dma]) -> bool {
    !batch.is_empty() && pieces::ops(batch, Rectangles::Never).all(|op| op.first.kind == DmaKind::SnapshotToDevice && stage::fits(&op))
}

#[cfg(test)]
mod tests {
    use super::*;
    use cl3::{command_queue as cq, event as ev};
    use uhmm_os::{BLOCK, Errno};

    fn opened() -> Option<Memory> {
        let Some(found) = crate::devices().into_iter().next() else {
            eprintln!("left out: there is no OpenCL device");
            return None;
        };
        Some(Memory::new(Device::open(&found).unwrap(), 4 * BLOCK).unwrap())
    }

    fn dma(kind: DmaKind, host: &mut [u8], frame: Frame) -> [Dma; 1] {
        [Dma { kind, host: host.as_mut_ptr() as usize, frame, offset: 0, len: host.len() }]
    }

    fn done(memory: &Memory, batch: &[Dma]) -> Result<(), DmaError> {
        memory.wait(memory.copy(batch), batch, Duration::from_secs(30))
    }

    #[test]
    fn a_failure_keeps_its_name() {
        let Some(memory) = opened() else { return };
        let mut host = vec![7u8; PAGE];
        assert_eq!((done(&memory, &dma(DmaKind::ToDevice, &mut host, 3)), memory.health.said()), (Ok(()), None));
        let beyond = (4 * BLOCK / PAGE) as Frame;
        for kind in [DmaKind::ToDevice, DmaKind::GuardedToDevice, DmaKind::ToHost, DmaKind::Zero] {
            assert_eq!(done(&memory, &dma(kind, &mut host, beyond)), Err(DmaError::Failed(Errno::IO)), "{kind:?}");
        }
        assert_eq!(memory.health.said(), Some("CL_INVALID_VALUE"));
        let mut back = vec![0; PAGE];
        assert_eq!(done(&memory, &dma(DmaKind::ToHost, &mut back, 3)), Ok(()));
        assert!(back == host && !memory.health.is_lost());
    }

    /// A byte for each place and seed.
    fn pattern(i: usize, seed: usize) -> u8 {
        ((i * 31 + seed * 7) ^ (i >> 8)) as u8
    }

    /// Pieces of every kind with strides and without go there and back, by every way that a device may take: each byte is right, and those in between are as before.
    #[test]
    fn strided_pieces_go_there_and_back() {
        uhmm_os::signal::install(|_| false).unwrap(); // for guarded copies
        for (way, takes, cpu) in [("any", true, None), ("packed", true, Some(false)), ("none", false, None)] {
            let Some(mut memory) = opened() else { return };
            memory.takes_rectangles = AtomicBool::new(takes);
            cpu.into_iter().for_each(|cpu| memory.device.pretend(cpu));
            for (seed, [there, back]) in [
                [DmaKind::ToDevice, DmaKind::ToHost],
                [DmaKind::LentToDevice, DmaKind::GuardedToHost],
                [DmaKind::GuardedToDevice, DmaKind::ToHost],
                [DmaKind::ToDevice, DmaKind::GuardedToHost],
            ]
            .into_iter()
            .enumerate()
            {
                let all: Vec<u8> = (0..4 * BLOCK).map(|i| pattern(i, seed + 100)).collect();
                let (mut host, mut whole) = ((0..4 * BLOCK).map(|i| pattern(i, seed)).collect::<Vec<u8>>(), all.clone());
                assert_eq!(done(&memory, &dma(DmaKind::ToDevice, &mut whole, 0)), Ok(()));
                // Bytes, strides there and here, pieces: every fourth page, bytes at odd places, more than a stage takes, and large ones.
                let sets =
                    [(PAGE, 4 * PAGE, 4 * PAGE, 300), (77, 1000, 513, 500), (9000, 9001, 20_000, 100), (100_000, 150_000, 101_001, 3)];
                let (mut at, mut from, mut batch, mut want) = (13, 5, vec![], all);
                for (len, on_device, on_host, count) in sets {
                    for i in 0..count {
                        let (at, from) = (at + i * on_device, from + i * on_host);
                        batch.push(Dma {
                            kind: there,
                            host: host[from..].as_mut_ptr() as usize,
                            frame: (at / PAGE) as Frame,
                            offset: at % PAGE,
                            len,
                        });
                        want[at..at + len].copy_from_slice(&host[from..from + len]);
                    }
                    (at, from) = (at + count * on_device + 3, from + count * on_host + 3);
                }
                assert_eq!(done(&memory, &batch), Ok(()), "{way}: {there:?}");
                assert_eq!(done(&memory, &dma(DmaKind::ToHost, &mut whole, 0)), Ok(()));
                assert!(whole == want, "{way}: {there:?}");
                // Back to other bytes: each piece comes, and nothing else changes.
                let mut want: Vec<u8> = (0..4 * BLOCK).map(|i| pattern(i, seed + 50)).collect();
                let base = host.as_ptr() as usize;
                batch.iter().for_each(|dma| want[dma.host - base..][..dma.len].copy_from_slice(&host[dma.host - base..][..dma.len]));
                host.iter_mut().enumerate().for_each(|(i, byte)| *byte = pattern(i, seed + 50));
                batch.iter_mut().for_each(|dma| dma.kind = back);
                assert_eq!(done(&memory, &batch), Ok(()), "{way}: {back:?}");
                assert!(host == want, "{way}: {back:?}");
            }
        }
    }

    /// It gets its pieces one by one, from then on without a try; a failure that is not the rectangle's stays one, and such a device is asked for rectangles as before.
    #[test]
    fn a_device_may_refuse_rectangles() {
        let Some(memory) = opened() else { return };
        let mut host: Vec<u8> = (0..BLOCK).map(|i| pattern(i, 1)).collect();
        let pieces = |kind, host: &mut [u8], from: usize| -> Vec<Dma> {
            (0..64)
                .map(|i| Dma {
                    kind,
                    host: host[8 * i * PAGE..].as_mut_ptr() as usize,
                    frame: (from + 2 * i) as Frame,
                    offset: 0,
                    len: PAGE,
                })
                .collect()
        };
        let beyond = 4 * BLOCK / PAGE - 100;
        assert_eq!(done(&memory, &pieces(DmaKind::ToDevice, &mut host, beyond)), Err(DmaError::Failed(Errno::IO)));
        assert!(memory.takes_rectangles.load(Ordering::Relaxed) && memory.health.said() == Some("CL_INVALID_VALUE"));
        let refused = api::tests::refusing(|| {
            for kind in [DmaKind::ToDevice, DmaKind::ToHost] {
                assert_eq!(done(&memory, &pieces(kind, &mut host, 7)), Ok(()), "{kind:?}");
                host.iter_mut().for_each(|byte| *byte = if kind == DmaKind::ToDevice { 0 } else { *byte });
            }
        });
        assert_eq!(refused, 1);
        let pieces_of = |i: usize| (i / PAGE).is_multiple_of(8);
        assert!(host.iter().enumerate().all(|(i, &byte)| byte == if pieces_of(i) { pattern(i, 1) } else { 0 }));
    }

    #[test]
    fn what_a_status_means() {
        let of = |code: i32| Status(code).of_copy();
        assert_eq!([-2, -34, -36].map(of), [DmaError::Lost; 3]);
        assert_eq!([-4, -5, -6].map(of), [DmaError::Failed(Errno::NOMEM); 3]);
        assert_eq!(of(-30), DmaError::Failed(Errno::IO));
        let health = Health::default();
        assert_eq!(health.of_copy(Undone::Failed(Status(-5))), DmaError::Failed(Errno::NOMEM));
        assert_eq!((health.is_lost(), health.said()), (false, Some("CL_OUT_OF_RESOURCES")));
        assert_eq!(health.of_copy(Undone::Failed(Status(-2))), DmaError::Lost);
        assert_eq!((health.is_lost(), health.said()), (true, Some("CL_DEVICE_NOT_AVAILABLE")));
    }

    /// Snapshots are not waited for, and yet nobody sees their frames before they have come: neither the kernel, which stands behind them in its queue, nor another copy.
    #[test]
    fn whatever_comes_later_comes_after_snapshots() {
        let Some(memory) = opened() else { return };
        let mut host = vec![7u8; 2 * PAGE];
        let batch = dma(DmaKind::SnapshotToDevice, &mut host, 3);
        let never = ev::create_user_event(memory.device.context()).unwrap();
        // SAFETY: queue and event are alive.
        let barrier = unsafe { cq::enqueue_barrier_with_wait_list(memory.device.kernels().raw(), 1, [never].as_ptr()) }.unwrap();
        assert_eq!(done(&memory, &batch), Ok(()), "no kernel has been asked for, so there is nothing to wait for");
        host.fill(1); // it was read before the wait was over
        let [mut beside, mut back] = [vec![9u8; PAGE], vec![0u8; 2 * PAGE]];
        let others = dma(DmaKind::ToDevice, &mut beside, 9);
        assert_eq!(done(&memory, &others), Ok(()), "other frames have nothing to do with it");
        let (read, limit) = (dma(DmaKind::ToHost, &mut back, 3), Duration::from_secs(30));
        let fence = memory.copy(&read);
        std::thread::sleep(Duration::from_millis(20));
        ev::set_user_event_status(never, 0).unwrap();
        assert_eq!(memory.wait(fence, &read, limit), Ok(()));
        assert!(back.iter().all(|&byte| byte == 7));
        assert_eq!(memory.arrived(), Ok(()));
        assert!(memory.ahead().is_empty(), "it has come");
        for event in [barrier, never] {
            // SAFETY: both are ours, and nobody waits for them.
            unsafe { ev::release_event(event) }.unwrap();
        }
        // A kernel that stands behind them and runs for long is nothing to wait for.
        assert_eq!(done(&memory, &batch), Ok(()));
        let runs = ev::create_user_event(memory.device.context()).unwrap();
        // SAFETY: as above; it stands for the kernel.
        let kernel = unsafe { cq::enqueue_barrier_with_wait_list(memory.device.kernels().raw(), 1, [runs].as_ptr()) }.unwrap();
        assert_eq!(memory.wait(memory.copy(&read), &read, Duration::from_secs(5)), Ok(()));
        ev::set_user_event_status(runs, 0).unwrap();
        assert_eq!(memory.arrived(), Ok(()));
        for event in [kernel, runs] {
            // SAFETY: as above.
            unsafe { ev::release_event(event) }.unwrap();
        }
        assert!(back.iter().all(|&byte| byte == 1));
        // Pieces that are one run when they are too large for a stage, as in two blocks beside each other.
        let (mut large, mut back) = (vec![5u8; 24 * PAGE], vec![0u8; 24 * PAGE]);
        let [whole] = dma(DmaKind::SnapshotToDevice, &mut large, 20);
        let half = Dma { len: 12 * PAGE, ..whole };
        let halves = [half, Dma { host: half.host + half.len, frame: half.frame + 12, ..half }];
        assert_eq!(done(&memory, &halves), Ok(()));
        assert_eq!(done(&memory, &dma(DmaKind::ToHost, &mut back, 20)), Ok(()));
        assert!(back == large);
        let beyond = (4 * BLOCK / PAGE) as Frame;
        assert_eq!(done(&memory, &dma(DmaKind::SnapshotToDevice, &mut host, beyond)), Err(DmaError::Failed(Errno::IO)));
    }

    /// A queue that does not get on, since what stands before in it waits for an event of the program's.
    #[test]
    fn a_device_that_hangs_is_lost_when_the_time_is_over() {
        for kind in [DmaKind::ToDevice, DmaKind::GuardedToDevice] {
            let Some(memory) = opened() else { return };
            let mut host = vec![7u8; PAGE];
            assert_eq!(done(&memory, &dma(kind, &mut host, 0)), Ok(()));
            let never = ev::create_user_event(memory.device.context()).unwrap();
            let before = [never];
            let barriers = memory.copies.each_ref().map(|queue| {
                // SAFETY: queue and event are alive.
                unsafe { cq::enqueue_barrier_with_wait_list(queue.raw(), 1, before.as_ptr()) }.unwrap()
            });
            let (limit, start) = (Duration::from_millis(200), Instant::now());
            let batch = dma(kind, &mut host, 1);
            assert_eq!(memory.wait(memory.copy(&batch), &batch, limit), Err(DmaError::Lost), "{kind:?}");
            assert!(start.elapsed() >= limit && start.elapsed() < 10 * limit, "{:?}", start.elapsed());
            assert!(memory.health.is_lost());
            ev::set_user_event_status(never, 0).unwrap();
            memory.copies.iter().for_each(|queue| cq::finish(queue.raw()).unwrap()); // what it was given is used until then
            // SAFETY: they are the test's own.
            unsafe {
                barriers.into_iter().for_each(|barrier| ev::release_event(barrier).unwrap());
                ev::release_event(never).unwrap();
            }
        }
    }
}
