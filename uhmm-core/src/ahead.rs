//! Reading ahead: blocks that come home before the CPU touches them.
//!
//! When the CPU takes block after block, the monitor would bring each while the toucher sleeps, and sleep while it reads. So the policy may name a run of
//! blocks that are likely to follow. The assistant brings them one by one; and the monitor, rather than wait for a block that the assistant
//! has in hand, takes the next. What comes is what a touch would have brought: no page of a running launch, nothing of another device's.
//! A launch, or a prefetch, ends what was asked for before it: whoever sends pages away does not want them back.

use crate::core::Core;
use crate::home;
use crate::monitor::kept;
use crate::page::Va;
use crate::policy::Run;
use crate::share;
use crate::sync::*;
use uhmm_os::BLOCK;

/// The blocks that nobody has taken yet. Its lock is a leaf.
#[derive(Debug, Default)]
pub(crate) struct Ahead {
    /// And the launch or prefetch that was the last one when they were named.
    run: Mutex<(Run, u64)>,
}

impl Ahead {
    /// These blocks shall come, instead of what is left of earlier ones.
    pub(crate) fn ask(&self, run: Run, launch: u64) {
        *self.run.lock() = (run, launch);
    }

    fn end(&self) {
        self.ask(Run::default(), 0);
    }

    fn take(&self) -> Option<(Va, bool, u64)> {
        let mut guard = self.run.lock();
        let (run, launch) = &mut *guard;
        let va = run.next;
        run.left = run.left.checked_sub(1)?;
        run.next = if run.down { va.wrapping_sub(BLOCK) } else { va.wrapping_add(BLOCK) };
        Some((va, run.duplicate, *launch))
    }
}

/// Brings one block home, if one is left to bring. The caller holds the event lock, or is the one who reads events.
pub(crate) fn step(core: &Core) -> bool {
    let Some((va, duplicate, launch)) = core.ahead.take() else { return false };
    let Some(block) = core.dir.get(va) else { return true };
    let mut state = block.lock();
    // Looked at with the lock: a launch is counted before it looks at its first block. So either this is seen, or the launch takes away what comes here.
    if core.last_launch() != launch {
        core.ahead.end();
        return true;
    }
    if state.device == 0 || state.mover != 0 {
        return true;
    }
    let pages = state.private() - kept(core, &state, va);
    if !pages.is_empty() {
        let dev = core.device(state.device as usize - 1);
        let came =
            if duplicate { share::share(core, dev, &mut state, va, pages) } else { home::bring_home(core, dev, &mut state, va, pages) };
        if came.is_err() {
            core.ahead.end(); // an event is unread: what it says may concern the rest
        }
    }
    true
}

/// The assistant's part: until nothing is left.
pub(crate) fn work(core: &Core) {
    loop {
        let _hold = core.space.hold();
        if !step(core) {
            return;
        }
    }
}
