//! Who is next: launches of one device take turns on it by number, and devices take turns among each other.
//!
//! A launch begins to be prepared while the one before it runs; on the device itself it waits for its number ([`Line`]). Whoever has a number goes
//! through the line, whatever becomes of him.
//!
//! Launches of one device at a time are under way in the process ([`Turns`]): a kernel may follow a pointer into a block of which a launch on another device
//! holds snapshots, and that one's into a block of this one's; they would wait for each other. What must find no launch anywhere (a fork, the closing of a
//! device) takes a turn like a device.

use crate::sync::*;

/// The line before one device.
#[derive(Debug, Default)]
pub(crate) struct Line {
    next: Mutex<u64>,
    moved: Condvar,
    /// Places that wait, for who only wants to know whether there are any.
    waiting: AtomicUsize,
}

/// A place in a line. It goes through when it is dropped.
#[derive(Debug)]
pub(crate) struct Place<'a> {
    line: &'a Line,
    number: u64,
}

impl Line {
    /// The place with this number; each has one owner.
    pub(crate) fn place(&self, number: u64) -> Place<'_> {
        Place { line: self, number }
    }

    /// Whether somebody waits behind the first.
    pub(crate) fn is_waited_in(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// Whoever [waits for something else too](Place::wait_or) looks for it again.
    pub(crate) fn look_again(&self) {
        drop(self.next.lock()); // who has looked in vain is waiting by now
        self.moved.notify_all();
    }
}

impl Place<'_> {
    /// Its number.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Waits until it is first, or `found` says that it need not be.
    pub(crate) fn wait_or(&self, mut found: impl FnMut() -> bool) {
        let mut next = self.line.next.lock();
        self.line.waiting.fetch_add(1, Ordering::Relaxed);
        while *next != self.number && !found() {
            next = self.line.moved.wait(next);
        }
        self.line.waiting.fetch_sub(1, Ordering::Relaxed);
    }

    /// Whether it is first.
    pub(crate) fn is_first(&self) -> bool {
        *self.line.next.lock() == self.number
    }

    /// Waits until it is.
    pub(crate) fn wait(&self) {
        self.wait_or(|| false);
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.wait();
        *self.line.next.lock() += 1;
        self.line.moved.notify_all();
    }
}

/// Whose turn it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Who {
    /// Launches of the device with this number.
    Device(usize),
    /// Who must be alone.
    Alone,
}

#[derive(Debug, Default)]
struct State {
    who: Option<Who>,
    inside: usize,
    waiting: usize,
}

/// The turns of a process.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    state: Mutex<State>,
    changed: Condvar,
}

/// A turn. It ends when it is dropped.
#[derive(Debug)]
pub(crate) struct Turn<'a>(&'a Turns);

impl Turns {
    fn may(state: &State, who: Who) -> bool {
        // Who waits for his turn is not kept waiting by a device that goes on and on.
        state.who.is_none() || (state.who == Some(who) && who != Who::Alone && state.waiting == 0)
    }

    fn take(&self, state: &mut State, who: Who) -> Turn<'_> {
        state.who = Some(who);
        state.inside += 1;
        Turn(self)
    }

    /// Waits for a turn.
    pub(crate) fn enter(&self, who: Who) -> Turn<'_> {
        let mut state = self.state.lock();
        if !Self::may(&state, who) {
            state.waiting += 1;
            while state.who.is_some() {
                state = self.changed.wait(state);
            }
            state.waiting -= 1;
        }
        self.take(&mut state, who)
    }

    /// Takes part in whatever device's turn it is, or takes this one's: for who waits for nobody. Who is alone is waited for.
    pub(crate) fn join(&self, device: usize) -> Turn<'_> {
        let mut state = self.state.lock();
        while state.who == Some(Who::Alone) {
            state = self.changed.wait(state);
        }
        let who = state.who.unwrap_or(Who::Device(device));
        self.take(&mut state, who)
    }

    /// For who tries again and again: while he has this, no device goes on and on.
    pub(crate) fn wanting(&self) -> Wanting<'_> {
        self.state.lock().waiting += 1;
        Wanting(self)
    }

    /// Takes a turn, unless it is somebody else's.
    pub(crate) fn try_enter(&self, who: Who) -> Option<Turn<'_>> {
        let mut state = self.state.lock();
        Self::may(&state, who).then(|| self.take(&mut state, who))
    }

    /// Ends a turn whose value was given up.
    pub(crate) fn leave(&self) {
        let mut state = self.state.lock();
        state.inside -= 1;
        if state.inside == 0 {
            state.who = None;
            drop(state);
            self.changed.notify_all();
        }
    }
}

/// Somebody tries to get a turn.
#[derive(Debug)]
pub(crate) struct Wanting<'a>(&'a Turns);

impl Drop for Wanting<'_> {
    fn drop(&mut self) {
        self.0.state.lock().waiting -= 1;
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_line_keeps_its_order_whatever_becomes_of_who_stands_in_it() {
        let line = Line::default();
        let order = std::sync::Mutex::new(vec![]);
        std::thread::scope(|scope| {
            for number in (0..8).rev() {
                let (line, order) = (&line, &order);
                scope.spawn(move || {
                    let place = line.place(number);
                    if number % 3 == 0 {
                        return; // gives up
                    }
                    place.wait();
                    assert!(place.is_first());
                    order.lock().unwrap().push(number);
                });
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        assert_eq!(order.into_inner().unwrap(), [1, 2, 4, 5, 7]);
    }

    #[test]
    fn one_device_at_a_time_and_nobody_waits_for_ever() {
        let turns = Turns::default();
        let inside = [const { AtomicUsize::new(0) }; 3];
        let together = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for thread in 0..6 {
                let (turns, inside, together) = (&turns, &inside, &together);
                scope.spawn(move || {
                    let who = thread % 3;
                    for _ in 0..300 {
                        let _turn = turns.enter(if who == 2 { Who::Alone } else { Who::Device(who) });
                        let beside = inside[who].fetch_add(1, Ordering::SeqCst);
                        together.fetch_max(if who == 2 { 0 } else { beside }, Ordering::SeqCst);
                        assert!((0..3).all(|other| other == who || inside[other].load(Ordering::SeqCst) == 0));
                        assert!(who < 2 || beside == 0);
                        std::thread::sleep(Duration::from_micros(20));
                        inside[who].fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert!(turns.try_enter(Who::Alone).is_some());
    }
}
