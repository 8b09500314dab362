//! What a batch of copies becomes on the device: as few calls as will do. To enqueue a piece costs six times as much as to copy a page (1.3 us and 0.2 us with PoCL), and to wait for each 25 us.
//!
//! * A *run* is pieces that follow each other on both sides.
//! * A *rectangle* is runs of one length whose addresses have one stride on the device and one on the host (clEnqueueWriteBufferRect, clEnqueueReadBufferRect): every eighth page of an array. Two
//!   runs are one already, if they are of one length: so pages at random places take half as many calls.
//! * Of pieces that pass through a stage only the device's addresses count, for there they lie one after the other: those from and to memory of the program that may be gone, and rectangles of a
//!   runtime that touches what lies between the rows ([`Device::by_rows`](crate::api::Device::by_rows)).
//!
//! Zeroes have no rectangle in OpenCL. The order of the batch stays.

use crate::api::Rows;
use core::ops::Range;
use uhmm_core::driver::{Dma, DmaKind};
use uhmm_os::PAGE;

/// Runs of so many bytes at most have a stage, so that those of a batch are under way together.
pub(crate) const SMALL: usize = 64 << 10;
/// The most bytes of a rectangle's stage.
const STAGE: usize = 1 << 20;
/// The largest stride: copy engines count it in 31 bits.
const STRIDE: usize = i32::MAX as usize;

/// Which rectangles a device is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rectangles {
    /// None.
    Never,
    /// Such whose rows lie one after the other on the host.
    Packed,
    /// Any.
    Any,
}

/// One call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Op {
    /// Which pieces of the batch it does, in their order.
    pub pieces: Range<usize>,
    /// The first run.
    pub first: Dma,
    /// All of them; the host's side is that of the stage, if there is one.
    pub rows: Rows,
    /// Whether it passes through a stage.
    pub staged: bool,
}

/// Bytes from the beginning of the device's memory.
pub(crate) fn at(dma: &Dma) -> usize {
    dma.frame as usize * PAGE + dma.offset
}

/// Whether it is from or to memory of the program that may be gone.
pub(crate) fn is_guarded(dma: &Dma) -> bool {
    matches!(dma.kind, DmaKind::GuardedToDevice | DmaKind::SnapshotToDevice | DmaKind::GuardedToHost)
}

/// The calls that do a batch.
pub(crate) fn ops(batch: &[Dma], rectangles: Rectangles) -> impl Iterator<Item = Op> {
    let mut done = 0;
    core::iter::from_fn(move || {
        let mut op = run(batch, done)?;
        let staged = op.staged || rectangles == Rectangles::Packed;
        while rectangles != Rectangles::Never
            && let Some(next) = run(batch, op.pieces.end)
            && let Some(rows) = with(&op, &next.first, staged)
        {
            op = Op { pieces: op.pieces.start..next.pieces.end, first: op.first, rows, staged };
        }
        done = op.pieces.end;
        Some(op)
    })
}

/// The run that begins with a piece.
fn run(batch: &[Dma], from: usize) -> Option<Op> {
    let mut first = *batch.get(from)?;
    let mut end = from + 1;
    while let Some(next) = batch.get(end).filter(|next| follows(&first, next)) {
        (first.len, end) = (first.len + next.len, end + 1);
    }
    Some(Op { pieces: from..end, first, rows: Rows::one(first.len), staged: is_guarded(&first) })
}

fn follows(run: &Dma, next: &Dma) -> bool {
    next.kind == run.kind && at(next) == at(run) + run.len && (next.kind == DmaKind::Zero || next.host == run.host + run.len)
}

/// The rows with a run more, if it goes on as they do.
fn with(op: &Op, next: &Dma, staged: bool) -> Option<Rows> {
    let (first, Rows { len, count, .. }) = (&op.first, op.rows);
    if next.kind != first.kind || next.len != len || first.kind == DmaKind::Zero {
        return None;
    }
    let stride = |last: usize, next: usize| next.checked_sub(last).filter(|stride| (len..=STRIDE).contains(stride));
    let device = stride(at(first) + (count - 1) * op.rows.device, at(next))?;
    let host = match staged {
        true => (len <= SMALL && (count + 1) * len <= STAGE).then_some(len)?,
        false => stride(first.host + (count - 1) * op.rows.host, next.host)?,
    };
    // Two rows make the strides.
    let goes_on = count == 1 || (device, host) == (op.rows.device, op.rows.host);
    goes_on.then_some(Rows { count: count + 1, device, host, ..op.rows })
}

#[cfg(test)]
mod tests {
    use super::*;
    use uhmm_core::driver::Frame;

    const KINDS: [DmaKind; 7] = [
        DmaKind::ToDevice,
        DmaKind::ToHost,
        DmaKind::GuardedToDevice,
        DmaKind::SnapshotToDevice,
        DmaKind::LentToDevice,
        DmaKind::GuardedToHost,
        DmaKind::Zero,
    ];

    fn piece(kind: DmaKind, host: usize, at: usize, len: usize) -> Dma {
        Dma { kind, host, frame: (at / PAGE) as Frame, offset: at % PAGE, len }
    }

    /// Both sides of a copy, each from address 0 on.
    #[derive(Clone, PartialEq, Eq)]
    struct Sides {
        device: Vec<u8>,
        host: Vec<u8>,
    }

    impl Sides {
        const LEN: usize = 3 * PAGE;

        fn random(random: &mut fastrand::Rng) -> Self {
            let mut side = || (0..Self::LEN).map(|_| random.u8(..)).collect();
            Sides { device: side(), host: side() }
        }

        fn copy(&mut self, kind: DmaKind, host: usize, at: usize, len: usize) {
            let (there, here) = (&mut self.device[at..at + len], host..host + len);
            match kind {
                DmaKind::Zero => there.fill(0),
                DmaKind::ToHost | DmaKind::GuardedToHost => self.host[here].copy_from_slice(there),
                _ => there.copy_from_slice(&self.host[here]),
            }
        }

        /// As the device does it, and who fills and empties stages.
        fn run(&mut self, batch: &[Dma], op: &Op) {
            let (kind, pieces, Rows { len, count, device, host }) = (op.first.kind, &batch[op.pieces.clone()], op.rows);
            let places = || pieces.iter().flat_map(|dma| dma.host..dma.host + dma.len);
            let mut other = match op.staged {
                true => Sides { device: vec![], host: places().map(|at| self.host[at]).collect() },
                false => Sides { device: vec![], host: std::mem::take(&mut self.host) },
            };
            std::mem::swap(&mut self.device, &mut other.device);
            let first = if op.staged { 0 } else { op.first.host };
            (0..count).for_each(|row| {
                other.copy(kind, if kind == DmaKind::Zero { 0 } else { first + row * host }, at(&op.first) + row * device, len)
            });
            self.device = other.device;
            match op.staged {
                true => places().zip(other.host).for_each(|(at, byte)| self.host[at] = byte),
                false => self.host = other.host,
            }
        }
    }

    /// Pieces of all kinds: alone, following each other, and with strides of which some end early or change.
    fn batch(random: &mut fastrand::Rng) -> Vec<Dma> {
        let mut batch = vec![];
        while batch.len() < 40 {
            let (kind, len) = (KINDS[random.usize(..KINDS.len())], random.usize(1..40));
            let mut stride = || len + [0, 0, 1, 24][random.usize(..4)];
            let (there, here) = (stride(), stride());
            let count = random.usize(1..12).min((Sides::LEN - len) / there.max(here));
            let mut start = |stride: usize| random.usize(..Sides::LEN - len - count * stride);
            let (at, host) = (start(there), start(here));
            batch.extend((0..count).map(|i| piece(kind, if kind == DmaKind::Zero { 0 } else { host + i * here }, at + i * there, len)));
            if random.u8(..4) == 0 {
                let last = batch.len() - 1;
                batch.swap(random.usize(..last.max(1)), last);
            }
        }
        batch
    }

    #[test]
    fn the_calls_do_what_the_pieces_say_and_nothing_else() {
        let mut random = fastrand::Rng::with_seed(1);
        let mut rectangles = 0;
        for _ in 0..3000 {
            let batch = batch(&mut random);
            let before = Sides::random(&mut random);
            let mut wanted = before.clone();
            batch.iter().for_each(|dma| wanted.copy(dma.kind, dma.host, at(dma), dma.len));
            for which in [Rectangles::Never, Rectangles::Packed, Rectangles::Any] {
                let mut done = before.clone();
                let mut next = 0;
                for op in ops(&batch, which) {
                    assert_eq!(op.pieces.start, next, "in the order of the batch");
                    next = op.pieces.end;
                    let Rows { len, count, device, host } = op.rows;
                    assert_eq!(count * len, batch[op.pieces.clone()].iter().map(|dma| dma.len).sum(), "{op:?}");
                    assert!(device >= len && host >= len && (!op.staged || host == len), "{op:?}");
                    assert!(count == 1 || which == Rectangles::Any || (which == Rectangles::Packed && op.staged), "{op:?}");
                    assert!(count == 1 || op.first.kind != DmaKind::Zero, "{op:?}");
                    rectangles += usize::from(count > 2);
                    done.run(&batch, &op);
                }
                assert_eq!(next, batch.len());
                assert!(done == wanted, "{which:?}: {batch:?}");
            }
        }
        assert!(rectangles > 3000, "{rectangles}");
    }

    fn strided(kind: DmaKind, count: usize, len: usize, there: usize, here: usize) -> Vec<Dma> {
        (0..count).map(|i| piece(kind, (1 << 30) + i * here, 5 * PAGE + i * there, len)).collect()
    }

    fn rows(batch: &[Dma], which: Rectangles) -> Vec<(usize, Rows)> {
        ops(batch, which).map(|op| (op.pieces.len(), op.rows)).collect()
    }

    #[test]
    fn one_stride_on_both_sides_is_one_rectangle() {
        let all = |count, len, device, host| vec![(count, Rows { len, count, device, host })];
        for kind in [DmaKind::ToDevice, DmaKind::ToHost, DmaKind::LentToDevice] {
            assert_eq!(rows(&strided(kind, 256, PAGE, 4 * PAGE, 3 * PAGE), Rectangles::Any), all(256, PAGE, 4 * PAGE, 3 * PAGE));
            assert_eq!(rows(&strided(kind, 256, PAGE, 4 * PAGE, 3 * PAGE), Rectangles::Packed), all(256, PAGE, 4 * PAGE, PAGE));
            assert_eq!(rows(&strided(kind, 3, PAGE, PAGE, 2 * PAGE), Rectangles::Any), all(3, PAGE, PAGE, 2 * PAGE));
            assert_eq!(rows(&strided(kind, 9, PAGE, 2 * PAGE, 3 * PAGE), Rectangles::Never), vec![(1, Rows::one(PAGE)); 9]);
        }
        // Runs of some pieces are rows as well.
        let pairs: Vec<Dma> =
            (0..10).flat_map(|i| [0, 1].map(|j| piece(DmaKind::ToDevice, (8 * i + j) * PAGE, (4 * i + j) * PAGE, PAGE))).collect();
        assert_eq!(rows(&pairs, Rectangles::Any), [(20, Rows { len: 2 * PAGE, count: 10, device: 4 * PAGE, host: 8 * PAGE })]);
        assert_eq!(rows(&strided(DmaKind::ToHost, 100, PAGE, PAGE, PAGE), Rectangles::Any), [(100, Rows::one(100 * PAGE))]);
    }

    #[test]
    fn in_a_stage_only_the_devices_stride_counts() {
        let mut scattered = strided(DmaKind::GuardedToHost, 8, PAGE, 2 * PAGE, 64 * PAGE);
        scattered.swap(2, 5);
        (scattered[2].frame, scattered[5].frame) = (scattered[5].frame, scattered[2].frame);
        assert_eq!(rows(&scattered, Rectangles::Any), [(8, Rows { len: PAGE, count: 8, device: 2 * PAGE, host: PAGE })]);
        // A stage has its limits.
        let counts = |len, count| {
            ops(&strided(DmaKind::GuardedToDevice, count, len, 2 * len, 2 * len), Rectangles::Any)
                .map(|op| op.rows.count)
                .collect::<Vec<_>>()
        };
        assert_eq!(counts(PAGE, 300), [256, 44]);
        assert_eq!(counts(SMALL, 17), [16, 1]);
        assert_eq!(counts(SMALL + 1, 3), [1, 1, 1]);
        let counts =
            |which| ops(&strided(DmaKind::ToDevice, 5, SMALL + 1, 2 * SMALL, 2 * SMALL), which).map(|op| op.rows.count).collect::<Vec<_>>();
        assert_eq!((counts(Rectangles::Any), counts(Rectangles::Packed)), (vec![5], vec![1; 5]));
    }

    #[test]
    fn what_has_no_common_stride_is_no_rectangle() {
        let counts = |places: &[(usize, usize)]| {
            let batch: Vec<Dma> = places.iter().map(|&(here, there)| piece(DmaKind::ToDevice, here * PAGE, there * PAGE, PAGE)).collect();
            ops(&batch, Rectangles::Any).map(|op| op.rows.count).collect::<Vec<_>>()
        };
        assert_eq!(counts(&[(0, 0), (2, 2), (5, 5), (7, 7)]), [2, 2]);
        assert_eq!(counts(&[(0, 0), (2, 3), (4, 6), (6, 8)]), [3, 1], "another stride on the device");
        assert_eq!(counts(&[(0, 0), (2, 3), (4, 6), (9, 9)]), [3, 1], "another stride on the host");
        assert_eq!(counts(&[(9, 0), (7, 2), (5, 4)]), [1, 1, 1], "backwards on the host");
        assert_eq!(counts(&[(0, 9), (2, 7), (4, 5)]), [1, 1, 1], "backwards on the device");
        assert_eq!(counts(&[(0, 0), (1 << 19, 2)]), [1, 1], "2 GiB apart");
        assert_eq!(counts(&[(0, 0), ((1 << 19) - 1, 2)]), [2]);
        let mut kinds = strided(DmaKind::ToDevice, 4, PAGE, 2 * PAGE, 2 * PAGE);
        kinds[2].kind = DmaKind::LentToDevice;
        assert_eq!(rows(&kinds, Rectangles::Any).iter().map(|(pieces, _)| *pieces).collect::<Vec<_>>(), [2, 1, 1]);
        for which in [Rectangles::Packed, Rectangles::Any] {
            assert_eq!(ops(&strided(DmaKind::Zero, 4, PAGE, 2 * PAGE, 0), which).count(), 4, "{which:?}");
        }
    }
}
