//! A thread of the program and a kernel that is running pass one page back and forth: a flag says whose turn it is, and the bytes beside it carry a message.
//! Both use the same pointer. The page moves to whoever touches it.
//!
//!     cargo run --release -p uhmm --example shared_flag
#![allow(unsafe_code)] // memory that both sides write, by turns

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;
use uhmm::{Ctx, Uhmm, args, ptr};

const TURNS: u32 = 200;

/// One page. Even turns are the CPU's, odd ones the device's; the bytes are those of whose turn it is.
#[repr(C, align(4096))]
struct Page {
    turn: AtomicU32,
    bytes: UnsafeCell<[u8; 1024]>,
}

// SAFETY: the bytes are used by the side only whose turn it is.
unsafe impl Sync for Page {}

/// Takes all turns of one side: checks what the other has left, and leaves one more in every byte.
fn play(page: &Page, odd: u32) {
    for turn in (odd..TURNS).step_by(2) {
        while page.turn.load(Ordering::Acquire) != turn {
            std::thread::yield_now(); // looking takes the page from the other side
        }
        // SAFETY: it is our turn.
        let bytes = unsafe { &mut *page.bytes.get() };
        assert!(bytes.iter().all(|&byte| byte == turn as u8), "turn {turn}");
        bytes.fill((turn + 1) as u8);
        page.turn.store(turn + 1, Ordering::Release);
    }
}

fn kernel(ctx: &Ctx<'_>) {
    // SAFETY: the pointer is lent while the kernel runs.
    play(unsafe { &*ctx.pointer::<Page>(0) }, 1);
}

fn main() -> Result<(), uhmm::Error> {
    let page = Box::new(Page { turn: AtomicU32::new(0), bytes: UnsafeCell::new([0; 1024]) });
    let hmm = Uhmm::new()?;
    let dev = hmm.device("soft")?;
    let start = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| play(&page, 0));
        // SAFETY: the kernel uses the page as the thread does: in its turn.
        dev.run(&kernel, 1, args![unsafe { ptr(&raw const *page) }])
    })?;
    println!("{TURNS} turns in {:?}", start.elapsed());
    println!("faults of the CPU: {}, of the device: {}", dev.stats().cpu_faults, dev.stats().device_faults);
    assert_eq!(page.turn.load(Ordering::Relaxed), TURNS);
    assert!(page.bytes.into_inner().iter().all(|&byte| byte == TURNS as u8));
    Ok(())
}
