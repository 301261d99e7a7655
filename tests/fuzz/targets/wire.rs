//! Tickets that people paste, and discovery resources as agents receive and report them.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use ursa_agent::relay::item_from_encoded;
use ursa_wire::discovery::Rejection;
use ursa_wire::ticket::Ticket;

fuzz_target!(|bytes: &[u8]| {
    let _ = item_from_encoded(Bytes::copy_from_slice(bytes));
    if let Ok(text) = std::str::from_utf8(bytes) {
        let rejections = Rejection::decode_all(text);
        assert_eq!(Rejection::decode_all(&Rejection::encode_all(&rejections)), rejections);
        if let Ok(ticket) = text.parse::<Ticket>() {
            let again = ticket.to_string().parse::<Ticket>().expect("a ticket that we wrote");
            assert_eq!(again.to_string(), ticket.to_string());
        }
    }
});
