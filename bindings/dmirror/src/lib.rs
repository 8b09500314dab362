//! The interface of Linux's dummy HMM device, served by uhmm: a library that is preloaded into a program (`LD_PRELOAD`), where /dev/hmm_dmirror0 to 3 can be opened then. 0 and 1 have private memory,
//! 2 and 3 coherent memory.
//!
//! The library translates, and knows nothing of pages: what a command means is [`uhmm_core::port`]'s.
//!
//! | module | |
//! |---|---|
//! | `interpose` | the functions of libc that it takes the place of |
//! | `device`, `name` | which files there are; how a descriptor is recognised |
//! | `opens` | what this process has opened, from the first open to the close of the last copy |
//! | `service` | the threads that hold the other ends of descriptors |
//! | `command`, `abi` | the commands; numbers and structs |
//! | `family` | what concerns every process that was forked from one |
//! | `wire` | commands of a process that has another's descriptor |
//! | `mapping` | changes of mappings; mappings of the device's file |
//! | `gup` | the file that pins pages |
//! | `stat` | what stat says of the files |
//! | `sys`, `lock` | system calls past libc; a lock |
//!
//! With `UHMM_DMIRROR=null` in the environment the devices do nothing and say that they did everything.

mod abi;
mod command;
mod device;
mod family;
mod gup;
mod interpose;
mod lock;
mod mapping;
mod name;
mod opens;
mod service;
mod stat;
mod sys;
mod wire;
