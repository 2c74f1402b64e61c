//! The kernel's ethtool family: which offloads an interface has on, and turning them on and off.

use anyhow::{Context, Result};
use ethtool::{
    EthtoolAttr, EthtoolChannelAttr, EthtoolCmd, EthtoolFeatureAttr, EthtoolHeader, EthtoolMessage,
};
use netlink_packet_core::{DecodeError, DefaultNla, Emitable, NLA_F_NESTED, ParseableParametrized};
use netlink_packet_generic::{
    GenlFamily, GenlHeader, GenlMessage,
    ctrl::{GenlCtrl, GenlCtrlCmd, nlas::GenlCtrlAttrs},
};
use netlink_sys::protocols::NETLINK_GENERIC;

use super::Requester;

const COMMAND_FEATURES_SET: u8 = 12;
const VERSION: u8 = 1;
const ATTRIBUTE_HEADER: u16 = 1;
const ATTRIBUTE_WANTED: u16 = 3;
const HEADER_IFINDEX: u16 = 1;
const HEADER_FLAGS: u16 = 3;
/// `ETHTOOL_FLAG_OMIT_REPLY` of the kernel: what came of it is asked for afterwards.
const OMIT_REPLY: u32 = 1 << 1;
const BITSET_BITS: u16 = 3;
const BITS_BIT: u16 = 1;
const BIT_NAME: u16 = 2;
const BIT_VALUE: u16 = 3;

/// A socket to the family.
pub struct Ethtool {
    requester: Requester,
    family: u16,
}

impl Ethtool {
    /// `None` if the kernel was built without.
    pub fn open() -> Result<Option<Self>> {
        let mut requester = Requester::open(NETLINK_GENERIC)?;
        let ask = GenlCtrl {
            cmd: GenlCtrlCmd::GetFamily,
            nlas: vec![GenlCtrlAttrs::FamilyName(
                EthtoolMessage::family_name().to_owned(),
            )],
        };
        let Ok(answer) = requester.request(GenlMessage::from_payload(ask), 0) else {
            return Ok(None);
        };
        let family = answer
            .iter()
            .flat_map(|message| &message.payload.nlas)
            .find_map(|attribute| match attribute {
                GenlCtrlAttrs::FamilyId(id) => Some(*id),
                _ => None,
            });
        Ok(family.map(|family| Self { requester, family }))
    }

    /// The offloads of an interface that are on, by the kernel's names.
    pub fn active(&mut self, ifindex: u32) -> Result<Vec<String>> {
        let header = EthtoolFeatureAttr::Header(vec![EthtoolHeader::DevIndex(ifindex)]);
        let mut ask = GenlMessage::from_payload(EthtoolMessage {
            cmd: EthtoolCmd::FeatureGet,
            nlas: vec![EthtoolAttr::Feature(header)],
        });
        ask.set_resolved_family_id(self.family);
        let answer = self.requester.request(ask, 0)?;
        Ok(answer
            .into_iter()
            .flat_map(|message| message.payload.nlas)
            .filter_map(|attribute| match attribute {
                EthtoolAttr::Feature(EthtoolFeatureAttr::Active(bits)) => Some(bits),
                _ => None,
            })
            .flatten()
            .filter(|bit| bit.value)
            .map(|bit| bit.name)
            .collect())
    }

    /// How many queues an interface has that receive and send; `None` if it does not tell.
    pub fn queues(&mut self, ifindex: u32) -> Option<u32> {
        let header = EthtoolChannelAttr::Header(vec![EthtoolHeader::DevIndex(ifindex)]);
        let mut ask = GenlMessage::from_payload(EthtoolMessage {
            cmd: EthtoolCmd::ChannelGet,
            nlas: vec![EthtoolAttr::Channel(header)],
        });
        ask.set_resolved_family_id(self.family);
        let answer = self.requester.request(ask, 0).ok()?;
        answer
            .iter()
            .flat_map(|message| &message.payload.nlas)
            .find_map(|attribute| match attribute {
                EthtoolAttr::Channel(EthtoolChannelAttr::CombinedCount(queues)) => Some(*queues),
                _ => None,
            })
    }

    /// Wants an offload on or off. The kernel acknowledges this whether or not the driver does it: [`Self::active`] tells.
    pub fn want(&mut self, ifindex: u32, offload: &str, on: bool) -> Result<()> {
        let mut message = GenlMessage::from_payload(Want(wish(ifindex, offload, on)));
        message.set_resolved_family_id(self.family);
        self.requester
            .request(message, 0)
            .map(drop)
            .with_context(|| format!("cannot turn {offload} {}", if on { "on" } else { "off" }))
    }
}

/// A wish about one offload. The crate `ethtool` can only read them.
#[derive(Clone, Debug)]
struct Want(Vec<DefaultNla>);

fn wish(ifindex: u32, offload: &str, on: bool) -> Vec<DefaultNla> {
    let number = |kind, number: u32| DefaultNla::new(kind, number.to_ne_bytes().to_vec());
    let mut bit = vec![DefaultNla::new(
        BIT_NAME,
        [offload.as_bytes(), &[0]].concat(),
    )];
    if on {
        bit.push(DefaultNla::new(BIT_VALUE, Vec::new()));
    }
    let header = [
        number(HEADER_IFINDEX, ifindex),
        number(HEADER_FLAGS, OMIT_REPLY),
    ];
    let bits = nested(BITSET_BITS, &[nested(BITS_BIT, &bit)]);
    vec![
        nested(ATTRIBUTE_HEADER, &header),
        nested(ATTRIBUTE_WANTED, &[bits]),
    ]
}

fn nested(kind: u16, inner: &[DefaultNla]) -> DefaultNla {
    let mut value = vec![0; inner.buffer_len()];
    inner.emit(&mut value);
    DefaultNla::new(kind | NLA_F_NESTED, value)
}

impl GenlFamily for Want {
    fn family_name() -> &'static str {
        EthtoolMessage::family_name()
    }

    fn command(&self) -> u8 {
        COMMAND_FEATURES_SET
    }

    fn version(&self) -> u8 {
        VERSION
    }
}

impl Emitable for Want {
    fn buffer_len(&self) -> usize {
        self.0.as_slice().buffer_len()
    }

    fn emit(&self, buffer: &mut [u8]) {
        self.0.as_slice().emit(buffer);
    }
}

/// The kernel only acknowledges.
impl ParseableParametrized<[u8], GenlHeader> for Want {
    fn parse_with_param(_: &[u8], _: GenlHeader) -> Result<Self, DecodeError> {
        Ok(Self(Vec::new()))
    }
}
