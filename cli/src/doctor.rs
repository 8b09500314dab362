//! `uhmm doctor`: what this machine and this user can do, what is missing, and how to get it. Needs no right of any kind.

use crate::report;
use anyhow::Result;
use owo_colors::OwoColorize;
use serde::Serialize;
use uhmm::{Mode, Uhmm};
use uhmm_os::system;
use uhmm_os::uffd::{Features, Rights, probe};

/// Runs the command.
pub(crate) fn run(json: bool) -> Result<()> {
    let found = Found::look();
    if json { report::print_json(&found) } else { report::print(&found.text()) }
}

#[derive(Serialize)]
struct Found {
    kernel: String,
    /// "full", "user-mode-only" or "none".
    mode: &'static str,
    features: Vec<&'static str>,
    huge_pages: String,
    rights: FoundRights,
    devices: Vec<FoundDevice>,
    missing: Vec<Missing>,
}

#[derive(Serialize)]
struct FoundRights {
    cap_sys_ptrace: bool,
    /// The sysctl vm.unprivileged_userfaultfd; null where the kernel has none.
    unprivileged_userfaultfd: Option<bool>,
    /// Whether /dev/userfaultfd can be opened.
    dev_userfaultfd: bool,
}

#[derive(Serialize)]
struct FoundDevice {
    name: String,
    /// What the hardware calls itself; null for devices in software.
    hardware: Option<String>,
    memory: usize,
    threads: usize,
    /// Kernels may touch what their launch does not declare.
    replayable_faults: bool,
    /// The CPU touches the device's memory in place.
    coherent: bool,
    /// Kernels use the program's memory in place, by its pointers: nothing moves.
    shares_pointers: bool,
}

#[derive(Serialize)]
struct Missing {
    what: String,
    /// What does not work, or works worse, without it.
    effect: String,
    how_to_get: String,
}

impl Missing {
    fn new(what: &str, effect: &str, how_to_get: impl Into<String>) -> Missing {
        Missing { what: what.into(), effect: effect.into(), how_to_get: how_to_get.into() }
    }
}

impl Found {
    fn look() -> Found {
        let mut missing = vec![];
        let (mode, features) = mode(&mut missing);
        if mode != "none" {
            missing.extend(missing_features(features, mode));
        }
        let huge_pages = system::thp_mode().unwrap_or_else(|| "unavailable".into());
        missing.extend(missing_huge_pages(&huge_pages));
        Found {
            kernel: system::kernel_release(),
            mode,
            features: features.names().collect(),
            huge_pages,
            rights: FoundRights {
                cap_sys_ptrace: system::has_cap_sys_ptrace(),
                unprivileged_userfaultfd: system::unprivileged_userfaultfd(),
                dev_userfaultfd: system::dev_userfaultfd().is_ok(),
            },
            devices: devices(&mut missing),
            missing,
        }
    }

    fn text(&self) -> String {
        let yes = |yes: bool| if yes { "yes" } else { "no" };
        let mut text = format!("{} {}\n", "kernel".bold(), self.kernel);
        text += &format!("{} {}\n", "mode".bold(), self.mode);
        text += &format!(
            "{} {}\n",
            "userfaultfd features".bold(),
            if self.features.is_empty() { "none".into() } else { self.features.join(" ") }
        );
        let sysctl = self.rights.unprivileged_userfaultfd.map_or("no such setting", yes);
        text += &format!(
            "{} CAP_SYS_PTRACE {}, vm.unprivileged_userfaultfd {sysctl}, /dev/userfaultfd {}\n",
            "rights".bold(),
            yes(self.rights.cap_sys_ptrace),
            yes(self.rights.dev_userfaultfd)
        );
        text += &format!("{} {}\n{}", "huge pages".bold(), self.huge_pages, "devices".bold());
        if self.devices.is_empty() {
            text += " none";
        }
        for device in &self.devices {
            let memory = if device.shares_pointers {
                "shares the program's pointers".into()
            } else if device.memory == 0 {
                "no memory".into()
            } else {
                format!("{} of memory", report::bytes(device.memory as u64))
            };
            let faults = if device.replayable_faults { "may touch any address" } else { "touches only what a launch declares" };
            text += &format!(
                "\n  {}  {memory}, {} threads, {faults}{}{}",
                device.name,
                device.threads,
                if device.coherent { ", coherent" } else { "" },
                device.hardware.as_ref().map_or(String::new(), |hardware| format!(" ({hardware})"))
            );
        }
        text.push('\n');
        if self.missing.is_empty() {
            return text + &format!("{}\n", "nothing is missing".green());
        }
        text += &format!("{}\n", "missing".yellow().bold());
        for missing in &self.missing {
            text += &format!("  {}: {}\n    {}\n", missing.what.bold(), missing.effect, missing.how_to_get);
        }
        text
    }
}

/// Which of the three modes uhmm has in this process, and the features of its userfaultfd.
fn mode(missing: &mut Vec<Missing>) -> (&'static str, Features) {
    let mode = Uhmm::new().map_or(Mode::None, |hmm| hmm.mode());
    let features = mode.rights().and_then(|rights| probe(rights).ok()).unwrap_or(Features::empty());
    let why = |rights| match probe(rights) {
        Err(error) => error.to_string(),
        Ok(_) if std::env::var_os(Mode::VARIABLE).is_some() => format!("unset {}", Mode::VARIABLE),
        Ok(_) => "use Linux 6.8 or newer".into(),
    };
    match mode {
        Mode::Full => {}
        Mode::UserModeOnly => {
            let effect = "results are copied home before each launch returns, unless they are left on a device";
            missing.push(Missing::new("kernel faults", effect, why(Rights::Full)));
        }
        Mode::None => {
            let effect = "launches copy everything that they declare in and out, and kernels may touch nothing else";
            missing.push(Missing::new("userfaultfd", effect, why(Rights::UserModeOnly)));
        }
    }
    (mode.name(), features)
}

fn missing_features(found: Features, mode: &str) -> Vec<Missing> {
    let needed = [
        (Features::MOVE, "UFFDIO_MOVE", "memory does not move: every launch copies", "use Linux 6.8 or newer"),
        (Features::WP_ASYNC, "UFFD_FEATURE_WP_ASYNC", "scattered writes and file mappings are not tracked", "use Linux 6.7 or newer"),
        (Features::POISON, "UFFDIO_POISON", "a lost page cannot be marked as lost", "use Linux 6.6 or newer"),
        (
            Features::EVENT_FORK,
            "UFFD_EVENT_FORK",
            "children made by raw clone, past glibc's fork, may lose pages that are on a device",
            "run with CAP_SYS_PTRACE, for example as root",
        ),
    ];
    let relevant = needed.into_iter().filter(|(feature, ..)| mode == "full" || *feature != Features::EVENT_FORK);
    relevant.filter(|(feature, ..)| !found.contains(*feature)).map(|(_, what, effect, how)| Missing::new(what, effect, how)).collect()
}

fn missing_huge_pages(mode: &str) -> Option<Missing> {
    let effect = "memory moves in pages of 4 KiB only";
    match mode {
        "always" | "madvise" => None,
        "never" => Some(Missing::new("huge pages", effect, "as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled")),
        _ => Some(Missing::new("huge pages", effect, "use a kernel with CONFIG_TRANSPARENT_HUGEPAGE=y")),
    }
}

/// Opens every kind of device that this build has.
fn devices(missing: &mut Vec<Missing>) -> Vec<FoundDevice> {
    let hmm = match Uhmm::new() {
        Ok(hmm) => hmm,
        // Said already, by `mode`.
        Err(uhmm::Error::NoUserfaultfd(_)) if !missing.is_empty() => return vec![],
        Err(error) => {
            missing.push(Missing::new("devices", "uhmm does not start, so none can be used", error.to_string()));
            return vec![];
        }
    };
    let opencl = uhmm::opencl_devices();
    let mut names: Vec<(&str, Option<String>, bool)> = uhmm::KINDS.iter().map(|kind| (*kind, None, false)).collect();
    if !opencl.is_empty() {
        names.retain(|(name, ..)| *name != "opencl");
        names.extend(opencl.iter().map(|device| {
            let hardware = format!("{}, {}, {}", device.name, device.kind, device.version);
            (device.id.as_str(), Some(hardware), device.system_pointers)
        }));
    }
    let mut devices = vec![];
    for (kind, hardware, shares_pointers) in names {
        match hmm.device(kind) {
            Ok(device) => devices.push(FoundDevice {
                name: device.name().into(),
                hardware,
                memory: device.memory(),
                threads: device.threads(),
                replayable_faults: device.info().capabilities.replayable_faults,
                coherent: device.info().capabilities.coherent,
                shares_pointers,
            }),
            Err(error) => missing.push(Missing::new(kind, "this device cannot be used", error.to_string())),
        }
    }
    devices
}
