//! What is looked at before a launch: every error that can be found before the kernel starts is found here, and nothing has changed yet.
//!
//! Who uses it: launches, and the host as executor in the crate `uhmm`, which makes one of the checks, [`overlap`], for itself.
//!
//! ```
//! use core::any::TypeId;
//! use uhmm_core::Error;
//! use uhmm_core::args::{Access, RawArg};
//! use uhmm_core::check::overlap;
//!
//! let bytes = |start, access| RawArg::Slice { start, count: 16, size: 1, ty: TypeId::of::<u8>(), name: "u8", access, device: None };
//! assert!(overlap(&[bytes(4096, Access::In), bytes(4104, Access::In)]).is_ok()); // nobody writes
//! assert!(matches!(overlap(&[bytes(4096, Access::In), bytes(4104, Access::Out)]), Err(Error::Overlap { .. })));
//! ```

use crate::args::{Access, RawArg};
use crate::core::{Core, Device};
use crate::error::Error;
use crate::gather;
use crate::kernel::Grid;
use crate::page::{Span, Va};
use crate::reach::Reaches;
use crate::sync::*;
use uhmm_os::{BLOCK, PAGE};

/// A part of an argument that lies in one mapping.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    /// Its bytes.
    pub start: Va,
    /// One past the last.
    pub end: Va,
    /// Whether its pages can move.
    pub movable: bool,
    /// Whether copies of its pages can stay on the device: the CPU's writes are noticed.
    pub shareable: bool,
}

/// Checks a launch's grid and arguments.
///
/// # Errors
/// The first thing that is wrong.
pub(crate) fn launch(core: &Core, dev: &Device, grid: Grid, args: &[RawArg], reaches: &Reaches) -> Result<usize, Error> {
    let groups = grid.groups().filter(|&n| n > 0).ok_or(Error::Grid(grid.size))?;
    let info = dev.driver.info();
    for (index, arg) in args.iter().enumerate() {
        if let RawArg::Pointer { bytes: 0, .. } = arg
            && !info.capabilities.replayable_faults
        {
            return Err(Error::BarePointer { index, device: info.name });
        }
        if let RawArg::Pointer { start, bytes, .. } = *arg {
            range(core, dev, index, start, start + bytes, Access::InOut)?;
        }
        if let RawArg::Slice { start, count, size, device, access, .. } = *arg {
            let end = count.checked_mul(size).and_then(|bytes| start.checked_add(bytes)).filter(|&end| end <= 1 << 47);
            match device {
                Some(id) if id != dev.id() => return Err(Error::OtherDevice { index }),
                Some(_) => {}
                None => range(core, dev, index, start, end.ok_or(Error::Overflow { index, start, count, size })?, access)?,
            }
        }
    }
    overlap(args)?;
    reaches.check(core)?;
    if core.has_lost.load(Ordering::Relaxed) {
        drop(core.space.hold()); // what has been unmapped is followed, not only announced
        lost(core, args)?;
    }
    // A coherent device uses in place what it has no room for.
    if info.memory > 0 && !info.capabilities.coherent {
        fits(dev, args, reaches)?;
    }
    Ok(groups)
}

fn range(core: &Core, dev: &Device, index: usize, start: Va, end: Va, access: Access) -> Result<(), Error> {
    if start == end {
        return Ok(());
    }
    if start == 0 {
        return Err(Error::Null { index, bytes: end });
    }
    if !dev.driver.reaches(start) || !dev.driver.reaches(end - 1) {
        return Err(Error::OutOfReach { index, address: start, device: dev.driver.info().name });
    }
    let mut at = start;
    while at < end {
        let vma = core.space.mapping(at).map_err(|e| Error::System("look up mappings", e))?;
        let Some(vma) = vma else { return Err(Error::Unmapped { index, address: at, start, end }) };
        if !vma.read || (access.writes() && !vma.write) {
            return Err(Error::Protected { index, address: at, write: access.writes() });
        }
        at = vma.end;
    }
    Ok(())
}

/// Whether an argument has a page that was lost.
fn lost(core: &Core, args: &[RawArg]) -> Result<(), Error> {
    for (index, arg) in args.iter().enumerate() {
        let Some((start, end, _)) = arg.process_range().filter(|range| range.0 < range.1) else { continue };
        let mut first = None;
        core.dir.for_each(Span::touching(start, end), |block, part| {
            let page = (block.lock().lost() & part.bits()).next(0);
            first = first.or(page.map(|page| Span::block(part.start).start + page * PAGE));
        });
        if let Some(address) = first {
            return Err(Error::PageLost { index, address });
        }
    }
    Ok(())
}

/// Whether written arguments overlap others.
///
/// # Errors
/// [`Error::Overlap`] with the first two that do.
pub fn overlap(args: &[RawArg]) -> Result<(), Error> {
    let ranges = |arg: &RawArg| match *arg {
        RawArg::Slice { start, count, size, access, .. } if count * size > 0 => Some((start, start + count * size, access)),
        _ => arg.process_range(),
    };
    for (second, b) in args.iter().enumerate() {
        for (first, a) in args[..second].iter().enumerate() {
            if let (Some(a), Some(b)) = (ranges(a), ranges(b))
                && (a.2.writes() || b.2.writes())
                && !one_allocation(&args[first], &args[second])
                && a.0.max(b.0) < a.1.min(b.1)
            {
                return Err(Error::Overlap { first, second, address: a.0.max(b.0) });
            }
        }
    }
    Ok(())
}

/// Whether two bare pointers lead into one allocation: it is declared once.
fn one_allocation(a: &RawArg, b: &RawArg) -> bool {
    matches!((a, b), (RawArg::Pointer { .. }, RawArg::Pointer { .. })) && a.process_range() == b.process_range()
}

/// Whether what the launch declares can be resident all at once: blocks that it covers need a unit each, single pages share units.
fn fits(dev: &Device, args: &[RawArg], reaches: &Reaches) -> Result<(), Error> {
    let (mut whole, mut pages) = (0, 0);
    for (start, end, _) in args.iter().filter_map(RawArg::process_range).filter(|range| range.0 < range.1) {
        let all = Span::touching(start, end);
        let blocks = Span { start: all.start.next_multiple_of(BLOCK), end: all.end / BLOCK * BLOCK };
        let inside = if blocks.start < blocks.end { blocks.len() } else { 0 };
        whole += inside / BLOCK;
        pages += (all.len() - inside) / PAGE;
    }
    let info = dev.driver.info();
    let needed = (whole + (pages * PAGE).div_ceil(BLOCK) + gather::units(dev, reaches)) * BLOCK;
    if needed > info.memory {
        return Err(Error::TooLarge { device: info.name, needed, capacity: info.memory });
    }
    let taken = dev.allocated();
    if needed + taken > info.memory {
        return Err(Error::NoRoom { device: info.name, needed, capacity: info.memory });
    }
    Ok(())
}

/// The parts of a byte range that can move and those that cannot, in order; what is not mapped is left out. Neighbouring mappings of one kind are one part:
/// a block should be migrated at once.
pub(crate) fn pieces(core: &Core, start: Va, end: Va, mut f: impl FnMut(Piece) -> Result<(), Error>) -> Result<(), Error> {
    let mut at = start;
    let mut piece: Option<Piece> = None;
    while at < end {
        let Ok(Some(vma)) = core.space.maps.find(at) else { break };
        let from = at.max(vma.start);
        let (movable, until) = core.space.moves(&vma, from);
        let next = Piece { start: from, end: end.min(until), movable, shareable: core.space.shares(&vma) };
        at = until;
        if next.start >= next.end {
            break;
        }
        match &mut piece {
            Some(piece) if piece.end == next.start && (piece.movable, piece.shareable) == (next.movable, next.shareable) => {
                piece.end = next.end
            }
            _ => {
                if let Some(done) = piece.replace(next) {
                    f(done)?;
                }
            }
        }
    }
    piece.map_or(Ok(()), f)
}
