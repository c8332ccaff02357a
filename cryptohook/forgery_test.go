package cryptohook

import (
	"testing"

	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/id"
)

// forger is a homeserver, or somebody with a device of its own, that wants a message of Alice's device to look proven. All keys and
// signatures are real, but for those that the forger cannot make.
type forger struct {
	*trustWorld
	alice  *actorDevice
	eve    *actor
	master object
	ssk    object
	// published are Alice's devices as the server shows them, embedded is what the Olm message holds.
	published map[id.DeviceID]object
	embedded  object
}

// forgeries are what may be tried. None makes a message verified, or that of the account's own device.
var forgeries = map[string]func(f *forger){
	"a device signed by somebody else's self-signing key": func(f *forger) {
		f.show(func(keys object) {
			signInto(keys, f.alice.owner.userID, f.eve.selfSigningKey().String(), f.eve.selfSigning)
		})
	},
	"a device signed by somebody else's self-signing key, in that one's name": func(f *forger) {
		f.show(func(keys object) { signInto(keys, f.eve.userID, f.eve.selfSigningKey().String(), f.eve.selfSigning) })
	},
	"somebody else's signature under the self-signing key's ID": func(f *forger) {
		f.show(func(keys object) {
			signInto(keys, f.alice.owner.userID, f.alice.owner.selfSigningKey().String(), f.eve.selfSigning)
		})
	},
	"a self-signing key that the master key has not signed": func(f *forger) {
		f.show(func(keys object) {
			signInto(keys, f.alice.owner.userID, f.eve.selfSigningKey().String(), f.eve.selfSigning)
		})
		f.ssk = crossSigningObject(f.alice.owner.userID, id.XSUsageSelfSigning, f.eve.selfSigningKey())
		signInto(f.ssk, f.alice.owner.userID, f.alice.owner.masterKey().String(), f.eve.master)
	},
	"a genuine signature of other device keys": func(f *forger) {
		other := f.alice.owner.addDevice("OTHER").keys()
		genuine := other["signatures"].(object)[f.alice.owner.userID.String()].(object)["ed25519:"+f.alice.owner.selfSigningKey().String()].(string)
		f.show(func(keys object) {
			putSignature(keys, f.alice.owner.userID, f.alice.owner.selfSigningKey().String(), genuine)
		})
	},
	"a genuine signature of a self-signing key on the master key's object": func(f *forger) {
		f.show(func(keys object) {
			signInto(keys, f.alice.owner.userID, f.eve.selfSigningKey().String(), f.eve.selfSigning)
		})
		f.ssk["keys"] = object{"ed25519:" + f.eve.selfSigningKey().String(): f.eve.selfSigningKey().String()}
	},
	"the IDs of the master and the self-signing key swapped": func(f *forger) {
		f.show(func(keys object) {
			signInto(keys, f.alice.owner.userID, f.alice.owner.masterKey().String(), f.alice.owner.selfSigning)
		})
	},
	"the device signed by the master key": func(f *forger) {
		f.show(func(keys object) {
			signInto(keys, f.alice.owner.userID, f.alice.owner.masterKey().String(), f.alice.owner.master)
		})
	},
	"the device's own keys swapped": func(f *forger) {
		f.show(func(keys object) {
			keys["keys"] = object{"curve25519:ALICE": f.alice.signingKey().String(), "ed25519:ALICE": f.alice.senderKey().String()}
		})
	},
	"an identity with our own master key": func(f *forger) {
		f.master = crossSigningObject(f.alice.owner.userID, id.XSUsageMaster, f.bot.masterKey())
		f.ssk = crossSigningObject(f.alice.owner.userID, id.XSUsageSelfSigning, f.eve.selfSigningKey())
		signInto(f.ssk, f.alice.owner.userID, f.bot.masterKey().String(), f.eve.master)
		f.show(func(keys object) {
			signInto(keys, f.alice.owner.userID, f.eve.selfSigningKey().String(), f.eve.selfSigning)
		})
	},
	"an identity with our own master and self-signing keys": func(f *forger) {
		f.master = crossSigningObject(f.alice.owner.userID, id.XSUsageMaster, f.bot.masterKey())
		f.ssk = f.bot.selfSigningObject()
		f.ssk["user_id"] = f.alice.owner.userID.String()
		f.ssk["signatures"] = object{f.alice.owner.userID.String(): f.ssk["signatures"].(object)[f.bot.userID.String()]}
		f.show(func(keys object) {
			signInto(keys, f.alice.owner.userID, f.bot.selfSigningKey().String(), f.eve.selfSigning)
		})
	},
	"a device ID that is the self-signing key": func(f *forger) {
		f.alice.deviceID = id.DeviceID(f.alice.owner.selfSigningKey())
		f.show(func(object) {})
	},
	"a device ID that is the master key": func(f *forger) {
		f.alice.deviceID = id.DeviceID(f.alice.owner.masterKey())
		f.show(func(object) {})
	},
	"a device whose ed25519 key is its ID": func(f *forger) {
		f.alice.deviceID = id.DeviceID(f.alice.signingKey())
		f.show(func(object) {})
	},
	"two devices with one curve25519 key, the other one signed": func(f *forger) {
		f.show(func(object) {})
		f.published["TWIN"] = f.twin()
	},
	"a signed device with this device's curve25519 key": func(f *forger) {
		f.embedded, f.published["TWIN"] = f.alice.selfSignedKeys(), f.twin()
	},
	"a forged signature that the server shows for a while": func(f *forger) {
		f.show(f.forgeSignature)
		f.know(f.alice.owner)
		f.show(func(object) {})
	},
	"a forged signature that another message showed": func(f *forger) {
		f.show(f.forgeSignature)
		f.sync(syncPart{toDevice: []object{f.share(f.alice, newMegolm(trustRoom), embedding(f.embedded))}})
		f.resolve()
		f.show(func(object) {})
	},
	"nothing signed at all, and small keys that fit any signature": func(f *forger) {
		const weak = id.Ed25519("AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA")
		f.ssk = crossSigningObject(f.alice.owner.userID, id.XSUsageSelfSigning, weak)
		f.master = crossSigningObject(f.alice.owner.userID, id.XSUsageMaster, weak)
		const fitsAll = "AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
		putSignature(f.ssk, f.alice.owner.userID, weak.String(), fitsAll)
		f.show(func(keys object) { putSignature(keys, f.alice.owner.userID, weak.String(), fitsAll) })
	},
}

// twin are the keys of another device of Alice's, properly signed, that says that it has this one's curve25519 key.
func (f *forger) twin() object {
	twin := &actorDevice{owner: f.alice.owner, deviceID: "TWIN", account: crypto.NewOlmAccount()}
	keys := twin.selfSignedKeys()
	keys["keys"].(object)["curve25519:TWIN"] = f.alice.senderKey().String()
	delete(keys, "signatures")
	signInto(keys, f.alice.owner.userID, "TWIN", twin.account)
	signInto(keys, f.alice.owner.userID, f.alice.owner.selfSigningKey().String(), f.alice.owner.selfSigning)
	return keys
}

func (f *forger) forgeSignature(keys object) {
	putSignature(keys, f.alice.owner.userID, f.alice.owner.selfSigningKey().String(), forgedSignature())
}

// show has the server and the message show Alice's device, with what a forger makes of its keys.
func (f *forger) show(forge func(keys object)) {
	for _, shown := range []*object{&f.embedded, nil} {
		keys := f.alice.selfSignedKeys()
		forge(keys)
		if shown != nil {
			*shown = keys
		} else {
			f.published[f.alice.deviceID] = keys
		}
	}
}

// TestForgeriesProveNothing tries each forgery on somebody whom nobody verified and on somebody whom we did, with and without the keys in
// the message, before and after the honest identity was seen, and after every retry.
func TestForgeriesProveNothing(t *testing.T) {
	for name, forge := range forgeries {
		t.Run(name, func(t *testing.T) {
			for way := range 8 {
				embeds, verified, knownBefore := way&1 != 0, way&2 != 0, way&4 != 0
				f := newForger(t, verified, knownBefore)
				forge(f)
				f.deceive(name, embeds)
			}
		})
	}
}

func newForger(t *testing.T, verified, knownBefore bool) *forger {
	t.Helper()
	f := &forger{trustWorld: newTrustWorld(t), eve: newActor("@eve:test"), published: make(map[id.DeviceID]object)}
	f.alice = newActor("@alice:test").addDevice("ALICE")
	f.alice.unpublished = true
	if verified {
		f.alice.owner.verifiedBy = f.bot
	}
	if knownBefore {
		f.know(f.alice.owner)
	}
	f.server.add(f.alice.owner)
	f.server.forge = f.lie
	f.master, f.ssk = f.alice.owner.masterObject(), f.alice.owner.selfSigningObject()
	return f
}

// lie puts what is shown of Alice into an answer to a key query.
func (f *forger) lie(answer object) {
	devices := object{}
	for deviceID, keys := range f.published {
		devices[deviceID.String()] = keys
	}
	answer["device_keys"].(object)["@alice:test"] = devices
	answer["master_keys"].(object)["@alice:test"] = f.master
	answer["self_signing_keys"].(object)["@alice:test"] = f.ssk
}

func (f *forger) deceive(name string, embeds bool) {
	f.t.Helper()

	session := newMegolm(trustRoom)
	embed := withoutDeviceKeys
	if embeds {
		embed = embedding(f.embedded)
	}
	f.sync(syncPart{toDevice: []object{f.share(f.alice, session, embed)}, changed: []id.UserID{"@alice:test"}})
	f.hook.resolver.ask("@alice:test")
	for range maxRetries + 1 {
		f.resolve()
		f.clock.advance(maxBackoff)
	}
	evt := f.say(f.alice, session, name)
	f.sync(syncPart{timeline: []object{evt}})
	f.handle()
	f.clock.advance(defaultKeyWait)
	f.handle()
	seen := f.sawOne(id.EventID(evt["event_id"].(string)))
	if code := seen.verdict.Code; code == CodeVerified || code == CodeUnverifiedIdentity || code == CodeIdentityChanged || seen.verdict.State.proven() {
		f.t.Errorf("%s (device keys in the message: %v): %s, %s", name, embeds, code, seen.verdict.State)
	}
}

// The same, with the signature that the forger lacks: else the table above could not fail.
func TestWhatIsNotForgedIsProven(t *testing.T) {
	f := newForger(t, true, false)
	f.show(func(keys object) {
		signInto(keys, f.alice.owner.userID, f.alice.owner.selfSigningKey().String(), f.alice.owner.selfSigning)
	})
	session := newMegolm(trustRoom)
	f.sync(syncPart{toDevice: []object{f.share(f.alice, session, embedding(f.embedded))}})
	f.resolve()
	wantCode(t, f.judgeNow(f.say(f.alice, session, "it is me")), CodeVerified)
}
