//! Kernels in OpenCL C. A kernel is written as always, with pointers to global memory; what uhmm calls is a small kernel of its own that is added to the program. It gets the device's one buffer
//! and an offset for each range, and calls the written one with pointers into that buffer. So a range may begin at any byte, where a sub-buffer could not. A kernel with local memory of its own
//! must not be called so; its parameters are exchanged in its text instead (in `signature`).
//!
//! What the parameters are is asked of the compiler (clGetKernelArgInfo), so that a launch whose arguments are others is refused before anything moves.
//!
//! No example: a part of the device; outside, only [`crate::open`] is used.
#![allow(unsafe_code)] // the foreign calls

use crate::api::{self, Device, Event, Status};
use crate::memory::{self, Memory};
use crate::signature::Signature;
use crate::table::Table;
use cl3::command_queue as cq;
use cl3::error_codes::{CL_INVALID_ARG_INDEX, CL_INVALID_ARG_VALUE};
use cl3::kernel as kn;
use cl3::program as pg;
use cl3::types::{cl_kernel, cl_mem, cl_program};
use core::ffi::c_void;
use core::fmt::Write;
use core::{ptr, slice};
use std::ffi::CString;
use std::sync::{Arc, Mutex, PoisonError};
use uhmm_core::args::{Access, RawArg};
use uhmm_core::driver::{KernelFault, Launch};
use uhmm_core::kernel::{Bound, Message, OpenCl};
use uhmm_os::signal;

/// The programs that a device has compiled.
#[derive(Debug, Default)]
pub struct Programs {
    list: Mutex<Vec<Arc<Loaded>>>,
    /// Their kernels get the process's pointers.
    native: bool,
}

/// A kernel that is ready.
#[derive(Debug)]
pub struct Loaded {
    form: OpenCl,
    params: Vec<Param>,
    /// It gets the process's pointers.
    native: bool,
    /// What the kernel is of.
    _program: Program,
    /// Its arguments are set by one thread at a time.
    kernel: Mutex<Kernel>,
}

/// What a parameter is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Param {
    /// A pointer to global memory: what it points to, and whether that is constant.
    Global {
        to: String,
        constant: bool,
    },
    /// A value.
    Value {
        of: String,
    },
    /// The number of elements of an argument: a parameter called `uhmm_len_N`.
    Length(usize),
    /// The device's memory, and the ranges in it: the parameter `UHMM`.
    Memory,
    Ranges,
}

impl Param {
    /// Whether uhmm gives it, not the launch.
    fn is_hidden(&self) -> bool {
        matches!(self, Param::Length(_) | Param::Memory | Param::Ranges)
    }
}

/// What is put before each program.
const HEADER: &str = include_str!("uhmm.cl");

#[derive(Debug)]
struct Program(cl_program);
// SAFETY: OpenCL's objects may be used by any thread (specification, appendix A.2).
unsafe impl Send for Program {}
// SAFETY: as above.
unsafe impl Sync for Program {}
impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: it is this value's own.
        let _ = unsafe { pg::release_program(self.0) };
    }
}

#[derive(Debug)]
struct Kernel(cl_kernel);
// SAFETY: as of `Program`; its arguments are set under a lock.
unsafe impl Send for Kernel {}
impl Drop for Kernel {
    fn drop(&mut self) {
        // SAFETY: it is this value's own.
        let _ = unsafe { kn::release_kernel(self.0) };
    }
}

impl Programs {
    /// Those of a device that shares the process's pointers.
    pub(crate) fn native() -> Self {
        Programs { native: true, ..Programs::default() }
    }

    /// The kernel of a form: compiled now, if no equal one was before.
    ///
    /// # Errors
    /// What is wrong with it, with the compiler's words.
    pub fn load(&self, device: &Device, form: &OpenCl) -> Result<Arc<Loaded>, String> {
        let mut programs = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |loaded: &&Arc<Loaded>| {
            let known = &loaded.form;
            known.name == form.name && known.options == form.options && known.source == form.source
        };
        if let Some(loaded) = programs.iter().find(same) {
            return Ok(loaded.clone());
        }
        let loaded = Arc::new(signal::keep(|| Loaded::compile(device, form, self.native))?);
        programs.push(loaded.clone());
        Ok(loaded)
    }
}

fn build(device: &Device, text: &str, options: &str) -> Result<Program, String> {
    let options = CString::new(options).map_err(|_| "the options for the compiler hold a zero byte".to_string())?;
    let program =
        pg::create_program_with_source(device.context(), &[text]).map_err(|code| format!("clCreateProgramWithSource: {}", Status(code)))?;
    let program = Program(program);
    pg::build_program(program.0, &[device.id()], &options, None, ptr::null_mut()).map_err(|code| {
        let log = pg::get_program_build_info(program.0, device.id(), pg::CL_PROGRAM_BUILD_LOG).map(String::from).unwrap_or_default();
        format!("{}\n{}", Status(code), log.trim_end_matches(['\0', '\n']))
    })?;
    Ok(program)
}

fn kernel(program: &Program, name: &str) -> Result<Kernel, String> {
    let c = CString::new(name).map_err(|_| "the kernel's name holds a zero byte".to_string())?;
    kn::create_kernel(program.0, &c).map(Kernel).map_err(|code| format!("there is no kernel {name} in its program: {}", Status(code)))
}

impl Loaded {
    fn compile(device: &Device, form: &OpenCl, native: bool) -> Result<Self, String> {
        let options = format!("{} -cl-kernel-arg-info{}", form.options, if native { " -D UHMM_NATIVE" } else { "" });
        let alone = build(device, &format!("{HEADER}{}", form.source), &options)?;
        let written = kernel(&alone, &form.name)?;
        let params = params(&written, &form.name)?;
        if native {
            share_pointers(&written).map_err(|status| format!("clSetKernelExecInfo: {status}"))?;
            return Ok(Loaded { form: form.clone(), params, native, _program: alone, kernel: Mutex::new(written) });
        }
        let (text, called) = match local_memory(device, &written)? {
            0 => (format!("{}\n{}", form.source, caller(&form.name, &params)), format!("uhmm_call_{}", form.name)),
            _ => (exchanged(&form.source, &form.name, &params)?, form.name.to_string()),
        };
        let program = build(device, &format!("{HEADER}{text}"), &form.options)?;
        let kernel = kernel(&program, &called)?;
        Ok(Loaded { form: form.clone(), params, native, _program: program, kernel: Mutex::new(kernel) })
    }

    /// Whether a launch's arguments are what the kernel takes.
    ///
    /// # Errors
    /// The first that is not, in words.
    pub fn check(&self, args: &[RawArg]) -> Result<(), String> {
        let name = &self.form.name;
        let own = self.params.iter().filter(|param| !param.is_hidden());
        let count = own.clone().count();
        // More of them only declare memory, as what stored pointers lead to.
        if args.len() < count || args[count..].iter().any(|arg| matches!(arg, RawArg::Value { .. })) {
            return Err(format!("kernel {name} has {count} parameters, and the launch {} arguments", args.len()));
        }
        for param in &self.params {
            if let Param::Length(of) = param
                && !matches!(args.get(*of), Some(RawArg::Slice { .. }))
            {
                return Err(format!("kernel {name} asks for uhmm_len_{of}, and argument {of} of the launch is no range with a length"));
            }
        }
        for (index, (param, arg)) in own.zip(args).enumerate() {
            let what = || format!("argument {index} of kernel {name}");
            match (param, arg) {
                (Param::Global { to, constant }, &RawArg::Slice { size, access, name: ty, .. }) => {
                    if size_of_type(to).is_some_and(|wanted| wanted != size && size % wanted != 0 && wanted % size != 0) {
                        return Err(format!("{} points to {to}, and the launch gives it {ty}", what()));
                    }
                    if access == Access::In && !constant {
                        return Err(format!("{} may be written by it: declare the parameter const, or give it with inout or out", what()));
                    }
                }
                (Param::Value { of }, &RawArg::Value { size, name: ty, .. }) => {
                    if size_of_type(of).is_some_and(|wanted| wanted != size) {
                        return Err(format!("{} is a value of type {of}, and the launch gives it {ty}", what()));
                    }
                }
                (Param::Global { .. }, RawArg::Pointer { .. }) | (Param::Length(_) | Param::Memory | Param::Ranges, _) => {}
                (Param::Value { of }, RawArg::Pointer { .. }) if self.native && size_of_type(of) == Some(size_of::<usize>()) => {}
                (Param::Global { to, .. }, _) => return Err(format!("{} is a pointer to {to}: give it with inp, out or inout", what())),
                (Param::Value { of }, _) => return Err(format!("{} is a value of type {of}: give it as a value", what())),
            }
        }
        Ok(())
    }

    /// Whether it can fail by itself.
    pub(crate) fn can_fail(&self) -> bool {
        self.params.contains(&Param::Ranges)
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// The status of OpenCL; an address that its kernel followed and that was not declared.
    pub(crate) fn run(&self, memory: &Memory, table: &Table, launch: &Launch, local: [usize; 3]) -> Result<(), KernelFault> {
        let bound = &launch.bound;
        let refused = |status: Status| {
            memory.health().failed(status);
            if status.is_loss() { KernelFault::Lost } else { KernelFault::Refused(Message::new(&status.to_string())) }
        };
        let follows = self.can_fail();
        if follows {
            memory.ranges().set(memory.device(), bound, table).map_err(refused)?;
        }
        let kernel = self.enqueue(memory, table, bound, local);
        let ended = kernel.and_then(|kernel| with_reads(memory, kernel, launch));
        ended.and(memory.arrived()).map_err(refused)?;
        let missed = if follows { memory.ranges().missed().map_err(refused)? } else { None };
        missed.map_or(Ok(()), |address| Err(KernelFault::NotDeclared { address, write: false }))
    }

    fn enqueue(&self, memory: &Memory, table: &Table, bound: &Bound, local: [usize; 3]) -> Result<Event, Status> {
        let kernel = self.kernel.lock().unwrap_or_else(PoisonError::into_inner);
        let set = |index: usize, size: usize, value: *const c_void| {
            // SAFETY: `size` bytes are valid at `value`, and are copied before the call returns.
            unsafe { kn::set_kernel_arg(kernel.0, index as u32, size, value) }.map_err(Status)
        };
        for (index, buffer) in [memory.buffer().raw(), memory.ranges().raw()].iter().enumerate() {
            set(index, size_of::<cl_mem>(), core::ptr::from_ref(buffer).cast())?;
        }
        let mut args = bound.args().iter();
        let mut index = 2;
        for param in &self.params {
            match param {
                Param::Memory | Param::Ranges => continue,
                Param::Length(of) => {
                    let Some(&RawArg::Slice { count, .. }) = bound.args().get(*of) else { return Err(Status(CL_INVALID_ARG_INDEX)) };
                    set(index, size_of::<u64>(), (&raw const count).cast())?;
                }
                Param::Global { .. } | Param::Value { .. } => match args.next() {
                    Some(arg @ (RawArg::Slice { .. } | RawArg::Pointer { .. })) => {
                        let at = place(arg, table).ok_or(Status(CL_INVALID_ARG_VALUE))? as u64;
                        set(index, size_of::<u64>(), (&raw const at).cast())?;
                    }
                    Some(RawArg::Value { bytes, size, .. }) => set(index, *size, bytes.as_ptr().cast())?,
                    None => return Err(Status(CL_INVALID_ARG_VALUE)),
                },
            }
            index += 1;
        }
        enqueue(memory.device(), &kernel, bound, local)
    }

    /// Runs it to its end, with the process's pointers.
    ///
    /// # Errors
    /// The status of OpenCL.
    pub(crate) fn run_native(&self, device: &Device, bound: &Bound, local: [usize; 3]) -> Result<(), Status> {
        let kernel = self.kernel.lock().unwrap_or_else(PoisonError::into_inner);
        let set = |index: usize, size: usize, value: *const c_void| {
            // SAFETY: `size` bytes are valid at `value`, and are copied before the call returns; null stands for no memory.
            unsafe { kn::set_kernel_arg(kernel.0, index as u32, size, value) }.map_err(Status)
        };
        let mut args = bound.args().iter();
        for (index, param) in self.params.iter().enumerate() {
            match param {
                Param::Memory | Param::Ranges => set(index, size_of::<cl_mem>(), ptr::null())?,
                Param::Length(of) => {
                    let Some(&RawArg::Slice { count, .. }) = bound.args().get(*of) else { return Err(Status(CL_INVALID_ARG_INDEX)) };
                    set(index, size_of::<u64>(), (&raw const count).cast())?;
                }
                Param::Global { .. } | Param::Value { .. } => match (param, args.next()) {
                    (Param::Global { .. }, Some(&(RawArg::Slice { start: at, .. } | RawArg::Pointer { address: at, .. }))) => {
                        // SAFETY: what a kernel does with a pointer is its launch's promise.
                        unsafe { kn::set_kernel_arg_svm_pointer(kernel.0, index as u32, at as *const c_void) }.map_err(Status)?;
                    }
                    (_, Some(RawArg::Value { bytes, size, .. })) => set(index, *size, bytes.as_ptr().cast())?,
                    (_, Some(RawArg::Pointer { address, .. })) => set(index, size_of::<usize>(), core::ptr::from_ref(address).cast())?,
                    _ => return Err(Status(CL_INVALID_ARG_VALUE)),
                },
            }
        }
        let ended = enqueue(device, &kernel, bound, local)?;
        api::wait(slice::from_ref(&ended)).and(ended.result())
    }
}

/// Tells OpenCL that the kernel may follow any pointer of the process.
fn share_pointers(kernel: &Kernel) -> Result<(), Status> {
    const FINE_GRAIN_SYSTEM: u32 = 0x11b7; // CL_KERNEL_EXEC_INFO_SVM_FINE_GRAIN_SYSTEM
    let yes = 1u32;
    // SAFETY: the kernel is alive, and a flag of that size is read before the call returns.
    unsafe { kn::set_kernel_exec_info(kernel.0, FINE_GRAIN_SYSTEM, size_of::<u32>(), (&raw const yes).cast()) }.map_err(Status)
}

/// Waits for a kernel, and for what is read behind it, which are waited for together.
fn with_reads(memory: &Memory, kernel: Event, launch: &Launch) -> Result<(), Status> {
    let reads = &launch.reads;
    let Ok(mut events) = memory.read_behind(reads.pieces()) else { return api::wait(slice::from_ref(&kernel)).and(kernel.result()) };
    launch.has_begun();
    events.push(kernel);
    let waited = api::wait(&events);
    if waited.is_err() {
        let _ = memory.device().kernels().finish(); // which of them has failed is asked next
    }
    let kernel = events.pop().map_or(Ok(()), |kernel| kernel.result());
    if events.iter().all(|read| read.result().is_ok()) {
        reads.are_done();
    }
    kernel
}

/// Starts a kernel whose arguments are set.
fn enqueue(device: &Device, kernel: &Kernel, bound: &Bound, local: [usize; 3]) -> Result<Event, Status> {
    let grid = bound.grid().size;
    let global = [0, 1, 2].map(|side| grid[side] * local[side]);
    let queue = device.kernels().raw();
    // SAFETY: queue and kernel are alive, and its arguments are set; both arrays have three sides. The event is given to nobody else.
    unsafe {
        cq::enqueue_nd_range_kernel(queue, kernel.0, 3, ptr::null(), global.as_ptr(), local.as_ptr(), 0, ptr::null())
            .map(|event| Event::new(event))
            .map_err(Status)
    }
}

/// Where a range lies in the device's memory.
pub(crate) fn place(arg: &RawArg, table: &Table) -> Option<usize> {
    match *arg {
        RawArg::Slice { start, device: Some(_), .. } => Some(memory::offset(start)),
        RawArg::Slice { count, size, .. } if count * size == 0 => Some(0),
        RawArg::Slice { start, count, size, .. } => table.offset(start, count * size),
        RawArg::Pointer { address, start, bytes } => table.offset(start, bytes).map(|at| at + (address - start)),
        RawArg::Value { .. } => None,
    }
}

/// What the kernel's parameters are.
fn params(kernel: &Kernel, name: &str) -> Result<Vec<Param>, String> {
    let count = kn::get_kernel_info(kernel.0, kn::CL_KERNEL_NUM_ARGS).map(u32::from).map_err(|code| Status(code).to_string())?;
    (0..count)
        .map(|index| {
            let ask = |what| {
                kn::get_kernel_arg_info(kernel.0, index, what).map_err(|code| format!("clGetKernelArgInfo of {name}: {}", Status(code)))
            };
            let space = u32::from(ask(kn::CL_KERNEL_ARG_ADDRESS_QUALIFIER)?);
            let text = String::from(ask(kn::CL_KERNEL_ARG_TYPE_NAME)?);
            let text = text.trim_end_matches('\0').trim();
            let constant = u64::from(ask(kn::CL_KERNEL_ARG_TYPE_QUALIFIER)?) & u64::from(kn::CL_KERNEL_ARG_TYPE_CONST) != 0;
            let called = String::from(ask(kn::CL_KERNEL_ARG_NAME)?);
            match called.trim_end_matches('\0') {
                "uhmm_memory" => return Ok(Param::Memory),
                "uhmm_ranges" => return Ok(Param::Ranges),
                other => {
                    if let Some(of) = other.strip_prefix("uhmm_len_").and_then(|of| of.parse().ok()) {
                        return Ok(Param::Length(of));
                    }
                }
            }
            match space {
                kn::CL_KERNEL_ARG_ADDRESS_GLOBAL => Ok(Param::Global { to: text.trim_end_matches('*').trim().into(), constant }),
                kn::CL_KERNEL_ARG_ADDRESS_PRIVATE => Ok(Param::Value { of: text.into() }),
                kn::CL_KERNEL_ARG_ADDRESS_CONSTANT => {
                    Err(format!("parameter {index} of kernel {name} is __constant: declare it __global const"))
                }
                _ => Err(format!("parameter {index} of kernel {name} is __local: declare local memory in the kernel itself")),
            }
        })
        .collect()
}

/// The kernel that calls the written one.
fn caller(name: &str, params: &[Param]) -> String {
    let (mut head, mut call) = (String::from("UHMM"), String::new());
    for (index, param) in params.iter().enumerate() {
        let comma = if index == 0 { "" } else { ", " };
        // Writing to a string cannot fail.
        let _ = match param {
            Param::Global { to, constant } => {
                let constant = if *constant { "const " } else { "" };
                write!(head, ", ulong uhmm_{index}")
                    .and_then(|()| write!(call, "{comma}(__global {constant}{to} *)(uhmm_memory + uhmm_{index})"))
            }
            Param::Value { of } => write!(head, ", {of} uhmm_{index}").and_then(|()| write!(call, "{comma}uhmm_{index}")),
            Param::Length(_) => write!(head, ", ulong uhmm_{index}").and_then(|()| write!(call, "{comma}uhmm_{index}")),
            Param::Memory => write!(call, "{comma}uhmm_memory"),
            Param::Ranges => write!(call, "{comma}uhmm_ranges"),
        };
    }
    format!("__kernel void uhmm_call_{name}({head}) {{ {name}({call}); }}\n")
}

/// Bytes of local memory that a kernel declares.
fn local_memory(device: &Device, kernel: &Kernel) -> Result<u64, String> {
    kn::get_kernel_work_group_info(kernel.0, device.id(), kn::CL_KERNEL_LOCAL_MEM_SIZE)
        .map(u64::from)
        .map_err(|code| format!("clGetKernelWorkGroupInfo: {}", Status(code)))
}

/// The program with the parameters of the kernel exchanged for those that the caller would have; its own become variables at its beginning.
fn exchanged(source: &str, name: &str, params: &[Param]) -> Result<String, String> {
    let (mut head, mut prologue) = (String::from("UHMM"), String::new());
    let found = Signature::find(source, name);
    // `UHMM` is one in the text, and two for the compiler.
    let own = params.iter().enumerate().filter(|(_, param)| **param != Param::Ranges);
    let found = found.filter(|found| own.clone().count() == found.params.iter().filter(|text| !matches!(**text, "" | "void")).count());
    let found = found.ok_or_else(|| {
        format!("kernel {name} has local memory, and its parameters are not found in the text: write its name and them without macros, but for UHMM")
    })?;
    for ((index, param), text) in own.zip(&found.params) {
        // Writing to a string cannot fail.
        let _ = match param {
            Param::Global { .. } => write!(head, ", ulong uhmm_{index}")
                .and_then(|()| write!(prologue, "{text} = (__global void *)(uhmm_memory + uhmm_{index}); ")),
            Param::Value { of } => write!(head, ", {of} uhmm_{index}").and_then(|()| write!(prologue, "{text} = uhmm_{index}; ")),
            Param::Length(_) => write!(head, ", ulong uhmm_{index}").and_then(|()| write!(prologue, "{text} = uhmm_{index}; ")),
            Param::Memory | Param::Ranges => Ok(()), // they have their names already
        };
    }
    Ok(found.with(&head, &prologue))
}

/// The bytes of a type that OpenCL C defines.
fn size_of_type(name: &str) -> Option<usize> {
    let base = name.trim_end_matches(|c: char| c.is_ascii_digit());
    let size = match base {
        "char" | "uchar" | "unsigned char" => 1,
        "short" | "ushort" | "unsigned short" | "half" => 2,
        "int" | "uint" | "unsigned int" | "float" => 4,
        "long" | "ulong" | "unsigned long" | "double" => 8,
        _ => return None,
    };
    match &name[base.len()..] {
        "" => Some(size),
        "3" => Some(4 * size), // specification 6.1.5: as large as a vector of four
        lanes => lanes.parse::<usize>().ok().map(|lanes| lanes * size),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_caller_names_every_argument() {
        let params = [
            Param::Global { to: "float4".into(), constant: true },
            Param::Value { of: "int".into() },
            Param::Global { to: "uint".into(), constant: false },
            Param::Length(2),
            Param::Memory,
            Param::Ranges,
        ];
        assert_eq!(
            caller("f", &params),
            "__kernel void uhmm_call_f(UHMM, ulong uhmm_0, int uhmm_1, ulong uhmm_2, ulong uhmm_3) \
             { f((__global const float4 *)(uhmm_memory + uhmm_0), uhmm_1, (__global uint *)(uhmm_memory + uhmm_2), uhmm_3, uhmm_memory, uhmm_ranges); }\n"
        );
    }

    #[test]
    fn parameters_become_variables() {
        let params = [
            Param::Global { to: "float4".into(), constant: true },
            Param::Memory,
            Param::Ranges,
            Param::Value { of: "int".into() },
            Param::Length(0),
        ];
        assert_eq!(
            exchanged("kernel void f(global const float4 *restrict a, UHMM, const int n, ulong uhmm_len_0) { g(); }", "f", &params)
                .unwrap(),
            "kernel void f(UHMM, ulong uhmm_0, int uhmm_3, ulong uhmm_4) { global const float4 *restrict a = (__global void *)(uhmm_memory + uhmm_0); \
             const int n = uhmm_3; ulong uhmm_len_0 = uhmm_4;   g(); }"
        );
        assert!(exchanged("#define P int n\nkernel void f(P, P2) {}", "f", &params[3..4]).unwrap_err().contains("without macros"));
        assert_eq!(exchanged("kernel void f(void) {}", "f", &[]).unwrap(), "kernel void f(UHMM) {  }");
    }

    #[test]
    fn sizes_are_those_of_the_language() {
        assert_eq!(
            ["float", "float3", "uchar16", "unsigned long", "struct node"].map(size_of_type),
            [Some(4), Some(16), Some(16), Some(8), None]
        );
    }
}
