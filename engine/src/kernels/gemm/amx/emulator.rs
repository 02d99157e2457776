//! AMX's instructions on processors that have none, to test what is made of them.
//!
//! The processor raises SIGILL at such an instruction; the handler does what Intel's manual
//! (Software Developer's Manual, volume 2) says of it, on tiles of the thread, and goes on behind
//! it. Where the processor has tiles, nothing is ever raised.
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "registers are addresses and numbers"
)]

use std::{cell::UnsafeCell, sync::Once};

use libc::{
    REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15, REG_RAX, REG_RBP,
    REG_RBX, REG_RCX, REG_RDI, REG_RDX, REG_RIP, REG_RSI, REG_RSP, c_int, c_void, siginfo_t,
    ucontext_t,
};

struct State {
    tiles: [[[u8; 64]; 16]; 8],
    /// Lines of each tile, and bytes of a line; none before `ldtilecfg`.
    shapes: [(usize, usize); 8],
}

thread_local! {
    static STATE: UnsafeCell<State> =
        const { UnsafeCell::new(State { tiles: [[[0; 64]; 16]; 8], shapes: [(0, 0); 8] }) };
}

/// Registers in the order of their numbers in instructions.
const REGISTERS: [c_int; 16] = [
    REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI, REG_R8, REG_R9,
    REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15,
];

/// Puts the handler in place, for all threads of the process.
pub(super) fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the action is plain bits; the handler has the signature that SA_SIGINFO asks for.
        unsafe {
            let mut action = std::mem::zeroed::<libc::sigaction>();
            action.sa_sigaction = handle as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            assert_eq!(libc::sigaction(libc::SIGILL, &raw const action, std::ptr::null_mut()), 0);
        }
    });
}

extern "C" fn handle(_: c_int, _: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the system gives the handler the registers, and the instruction is readable. The
    // state is this thread's, which is in this handler.
    unsafe {
        let registers = &mut (*context.cast::<ucontext_t>()).uc_mcontext.gregs;
        let at = registers[REG_RIP as usize] as *const u8;
        let length = STATE.with(|state| emulate(&mut *state.get(), at, registers));
        match length {
            Some(length) => registers[REG_RIP as usize] += i64::from(length),
            // Not ours: raised again, it ends the process.
            None => drop(libc::signal(libc::SIGILL, libc::SIG_DFL)),
        }
    }
}

/// Does what the instruction at `at` says; its length, or `None` if it is not one of AMX.
///
/// # Safety
///
/// What the instruction reads and writes must be there.
unsafe fn emulate(state: &mut State, at: *const u8, registers: &[i64; 23]) -> Option<u8> {
    // SAFETY: as above.
    let byte = |i: usize| unsafe { at.add(i).read() };
    let (prefix, extensions, vector, opcode, modrm) = (byte(0), byte(1), byte(2), byte(3), byte(4));
    if prefix != 0xc4 || extensions & 0x1f != 2 || vector & 0x84 != 0 {
        return None;
    }
    let (mode, register, operand) = (modrm >> 6, usize::from(modrm >> 3 & 7), modrm & 7);
    let extended = |number: u8, bit: u32| {
        REGISTERS[usize::from(number) + if extensions & 1 << bit == 0 { 8 } else { 0 }] as usize
    };
    // An address is base, index (scale 1) and a displacement; also the number of its bytes.
    let address = || {
        let (base, stride, mut length) = if operand == 4 {
            let sib = byte(5);
            (extended(sib & 7, 5), registers[extended(sib >> 3 & 7, 6)] << (sib >> 6), 6)
        } else {
            (extended(operand, 5), 0, 5)
        };
        let displacement = match mode {
            1 => i64::from(byte(length.into()).cast_signed()),
            2 => i64::from(i32::from_le_bytes([0, 1, 2, 3].map(|i| byte(usize::from(length) + i)))),
            _ => 0,
        };
        length += [0u8, 1, 4][usize::from(mode)];
        ((registers[base] + displacement) as *mut u8, stride as usize, length)
    };
    let (lines, width) = state.shapes[register];
    match (opcode, vector & 3, mode) {
        (0x49, 0, 3) => state.shapes = [(0, 0); 8],
        (0x49, 0, _) => {
            let (from, _, length) = address();
            // SAFETY: as above: 64 bytes.
            let configuration = unsafe { from.cast::<[u8; 64]>().read() };
            assert_eq!(configuration[0], 1, "palette");
            let shape = |i: usize| {
                let width = [configuration[16 + 2 * i], configuration[17 + 2 * i]];
                (configuration[48 + i].into(), u16::from_le_bytes(width).into())
            };
            state.shapes = [0, 1, 2, 3, 4, 5, 6, 7].map(shape);
            state.tiles = [[[0; 64]; 16]; 8];
            return Some(length);
        }
        (0x49, 3, 3) => state.tiles[register] = [[0; 64]; 16],
        (0x4b, 3 | 1, _) => {
            let (from, stride, length) = address();
            state.tiles[register] = [[0; 64]; 16];
            for (i, line) in state.tiles[register].iter_mut().take(lines).enumerate() {
                // SAFETY: as above: so many bytes at every line.
                unsafe { from.add(i * stride).copy_to(line.as_mut_ptr(), width) };
            }
            return Some(length);
        }
        (0x4b, 2, _) => {
            let (to, stride, length) = address();
            for (i, line) in state.tiles[register].iter().take(lines).enumerate() {
                // SAFETY: as above.
                unsafe { to.add(i * stride).copy_from(line.as_ptr(), width) };
            }
            return Some(length);
        }
        (0x5e, signs, 3) => {
            let (left, right) = (usize::from(operand), usize::from(!vector >> 3 & 15));
            let depth = state.shapes[left].1;
            assert_eq!(state.shapes[left].0, lines, "lines of the left tile");
            assert_eq!(state.shapes[right], (depth / 4, width), "shape of the right tile");
            let as_i32 = |byte: u8, signed: bool| {
                if signed { i32::from(byte.cast_signed()) } else { i32::from(byte) }
            };
            for row in 0..lines {
                for column in 0..width / 4 {
                    let product = |i: usize| {
                        let x = as_i32(state.tiles[left][row][i], signs & 2 != 0);
                        let y = state.tiles[right][i / 4][4 * column + i % 4];
                        x * as_i32(y, signs & 1 != 0)
                    };
                    let sum = (0..depth).map(product).fold(0, i32::wrapping_add);
                    let (places, _) = state.tiles[register][row].as_chunks_mut::<4>();
                    let place = &mut places[column];
                    *place = i32::from_le_bytes(*place).wrapping_add(sum).to_le_bytes();
                }
            }
        }
        _ => return None,
    }
    Some(5)
}
