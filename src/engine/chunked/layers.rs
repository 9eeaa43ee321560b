//! Flattens a chain: says of each byte of the volume which backup of the chain has it last.
//!
//! The backups are layers, the newest on top. One sweep from the first byte to the last goes through all of their
//! objects side by side, and needs no more memory than what one object of each of them takes. Notes of restores
//! (`restored.rs`) build on the order in which the objects come.

use std::ops::Range;

use tokio::sync::mpsc;

use super::metadata::ObjectEntry;
use super::stored::Checksum;

/// An object as its layer lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerEntry {
    /// The object.
    pub entry: ObjectEntry,
    /// What it is in the store, where that is known.
    pub checksum: Option<Checksum>,
}

/// An object to be read, and what of it belongs in the volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Which backup of the chain it belongs to; 0 is the newest.
    pub layer: usize,
    /// The object.
    pub object: LayerEntry,
    /// The ranges of the volume that come from it, in order. Empty when newer objects have all of it.
    pub ranges: Vec<Range<u64>>,
}

/// Why the layers do not make a volume.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// Two objects of one backup hold the same bytes.
    #[error("object {number} begins at byte {offset}, before the end of the one listed before it")]
    Overlap {
        /// The backup; 0 is the newest.
        layer: usize,
        /// The object.
        number: u64,
        /// Where it begins.
        offset: u64,
    },
    /// An object reaches beyond the volume.
    #[error("object {number} reaches beyond the end of the volume, which has {volume_bytes} bytes")]
    BeyondTheEnd {
        /// The backup; 0 is the newest.
        layer: usize,
        /// The object.
        number: u64,
        /// The volume's size.
        volume_bytes: u64,
    },
    /// No backup of the chain has some bytes.
    #[error("no object of the chain holds byte {offset} of the volume")]
    Gap {
        /// The first of the bytes.
        offset: u64,
    },
}

#[derive(Debug)]
struct Layer {
    entries: mpsc::Receiver<LayerEntry>,
    next: Option<LayerEntry>,
    open: Option<(LayerEntry, Vec<Range<u64>>)>,
    end: u64,
}

/// The sweep.
#[derive(Debug)]
pub struct Layers {
    layers: Vec<Layer>,
    position: u64,
    volume_bytes: u64,
}

impl Layers {
    /// Begins a sweep over a volume of `volume_bytes`, with the objects of each backup in order, the newest first.
    pub fn new(layers: Vec<mpsc::Receiver<LayerEntry>>, volume_bytes: u64) -> Self {
        let layer = |entries| Layer { entries, next: None, open: None, end: 0 };
        Self { layers: layers.into_iter().map(layer).collect(), position: 0, volume_bytes }
    }

    /// The first byte that a range of an item still to come may begin at.
    pub fn low_water(&self) -> u64 {
        let open = self.layers.iter().filter_map(|layer| layer.open.as_ref());
        open.filter_map(|(_, ranges)| Some(ranges.first()?.start)).fold(self.position, u64::min)
    }

    /// The next object that the sweep has passed; none at the end of the volume.
    pub async fn next(&mut self) -> Result<Option<Item>, Broken> {
        loop {
            for (index, layer) in self.layers.iter_mut().enumerate() {
                layer.advance(index, self.position, self.volume_bytes).await?;
                if let Some((object, ranges)) = layer.open.take_if(|(o, _)| o.entry.end() <= self.position) {
                    return Ok(Some(Item { layer: index, object, ranges }));
                }
            }
            if self.position == self.volume_bytes {
                return Ok(None);
            }
            // The newest layer that has the byte has it up to its object's end, or to where a newer one begins.
            let mut end = self.volume_bytes;
            let mut found = false;
            for layer in &mut self.layers {
                if let Some((object, ranges)) = &mut layer.open {
                    end = end.min(object.entry.end());
                    ranges.push(self.position..end);
                    found = true;
                    break;
                }
                if let Some(next) = &layer.next {
                    end = end.min(next.entry.offset);
                }
            }
            if !found {
                return Err(Broken::Gap { offset: self.position });
            }
            self.position = end;
        }
    }
}

impl Layer {
    /// Takes the next entry in, and opens it when the sweep has come to it.
    async fn advance(&mut self, index: usize, position: u64, volume_bytes: u64) -> Result<(), Broken> {
        if self.next.is_none()
            && let Some(next) = self.entries.recv().await
        {
            let entry = &next.entry;
            if entry.offset < self.end {
                return Err(Broken::Overlap { layer: index, number: entry.number, offset: entry.offset });
            }
            if entry.end() > volume_bytes {
                return Err(Broken::BeyondTheEnd { layer: index, number: entry.number, volume_bytes });
            }
            self.end = entry.end();
            self.next = Some(next);
        }
        if self.open.is_none()
            && let Some(next) = self.next.take_if(|next| next.entry.offset <= position)
        {
            self.open = Some((next, Vec::new()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::compression::Compression;
    use super::*;

    fn layer(objects: &[(u64, u64)]) -> mpsc::Receiver<LayerEntry> {
        let (sender, receiver) = mpsc::channel(objects.len().max(1));
        for (index, (offset, length)) in objects.iter().enumerate() {
            let entry = ObjectEntry {
                number: index as u64 + 1,
                offset: *offset,
                length: *length,
                compression: Compression::None,
                md5: [0; 16],
            };
            sender.try_send(LayerEntry { entry, checksum: None }).unwrap();
        }
        receiver
    }

    fn run(layers: &[Vec<(u64, u64)>], volume_bytes: u64) -> Result<Vec<Item>, Broken> {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let mut layers = Layers::new(layers.iter().map(|objects| layer(objects)).collect(), volume_bytes);
            let mut items = Vec::new();
            while let Some(item) = layers.next().await? {
                assert!(layers.low_water() <= layers.position);
                items.push(item);
            }
            Ok(items)
        })
    }

    #[test]
    #[allow(clippy::single_range_in_vec_init)] // Lists of ranges are what this is about.
    fn a_newer_object_in_the_middle_splits_an_older_one() {
        let items = run(&[vec![(10, 5)], vec![(0, 20), (20, 4)]], 24).unwrap();
        let told: Vec<_> = items.iter().map(|i| (i.layer, i.object.entry.number, i.ranges.clone())).collect();
        assert_eq!(told, [(0, 1, vec![10..15]), (1, 1, vec![0..10, 15..20]), (1, 2, vec![20..24])]);
    }

    #[test]
    fn an_object_that_is_covered_all_over_is_still_told() {
        let items = run(&[vec![(0, 8)], vec![(0, 4), (4, 4)]], 8).unwrap();
        assert_eq!(items.len(), 3);
        assert_eq!(items.iter().filter(|item| item.ranges.is_empty()).count(), 2);
    }

    #[test]
    fn layers_that_make_no_volume_are_refused() {
        assert_eq!(run(&[vec![(0, 4)]], 8), Err(Broken::Gap { offset: 4 }));
        assert_eq!(run(&[vec![(4, 4)]], 8), Err(Broken::Gap { offset: 0 }));
        assert_eq!(run(&[vec![(0, 4), (3, 5)]], 8), Err(Broken::Overlap { layer: 0, number: 2, offset: 3 }));
        assert!(matches!(run(&[vec![(0, 9)]], 8), Err(Broken::BeyondTheEnd { .. })));
        assert!(matches!(run(&[vec![(0, 8), (8, 1)]], 8), Err(Broken::BeyondTheEnd { .. })));
    }

    proptest! {
        /// Painting the layers one over the other, oldest first, gives the same answer for each byte.
        #[test]
        fn every_byte_comes_from_the_newest_layer_that_has_it(
            cuts in proptest::collection::vec((1u64..6, any::<bool>()), 4..40),
            layer_count in 1usize..5,
        ) {
            let volume_bytes = 24;
            let mut layers: Vec<Vec<(u64, u64)>> = Vec::new();
            let mut cuts = cuts.into_iter().cycle();
            for index in 0..layer_count {
                let (mut objects, mut offset) = (Vec::new(), 0);
                while offset < volume_bytes {
                    let (length, present) = cuts.next().unwrap();
                    let length = length.min(volume_bytes - offset);
                    if present || index == layer_count - 1 {
                        objects.push((offset, length));
                    }
                    offset += length;
                }
                layers.push(objects);
            }
            let mut expected = vec![None; volume_bytes as usize];
            for (index, objects) in layers.iter().enumerate().rev() {
                for (number, (offset, length)) in objects.iter().enumerate() {
                    expected[*offset as usize..(*offset + *length) as usize].fill(Some((index, number as u64 + 1)));
                }
            }

            let items = run(&layers, volume_bytes).unwrap();

            let mut actual = vec![None; volume_bytes as usize];
            for item in &items {
                for range in &item.ranges {
                    for byte in range.clone() {
                        prop_assert_eq!(actual[byte as usize], None, "written twice");
                        actual[byte as usize] = Some((item.layer, item.object.entry.number));
                    }
                }
            }
            prop_assert_eq!(actual, expected);
            prop_assert_eq!(items.len(), layers.iter().map(Vec::len).sum::<usize>());
        }
    }
}
