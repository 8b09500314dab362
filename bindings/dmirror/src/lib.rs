//! The interface of Linux's dummy HMM device, served by uhmm.
