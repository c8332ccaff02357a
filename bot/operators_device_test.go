package bot

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/crypto/olm"
	"maunium.net/go/mautrix/crypto/signatures"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

const olga = id.UserID("@olga:example.com")

// olgasAccount is what a homeserver says of an operator: her identity, and the devices that she has now.
type olgasAccount struct {
	t                   *testing.T
	master, selfSigning olm.PKSigning
	devices             map[id.DeviceID]mautrix.DeviceKeys
	silent              bool
}

func newOlgasAccount(t *testing.T) *olgasAccount {
	t.Helper()
	return &olgasAccount{
		t: t, master: must(olm.NewPKSigning())(t), selfSigning: must(olm.NewPKSigning())(t), devices: make(map[id.DeviceID]mautrix.DeviceKeys),
	}
}

// logIn gives her a device, and has her confirm it.
func (o *olgasAccount) logIn(deviceID id.DeviceID) {
	o.t.Helper()
	account := crypto.NewOlmAccount()
	keys := mautrix.DeviceKeys{
		UserID: olga, DeviceID: deviceID, Algorithms: []id.Algorithm{id.AlgorithmOlmV1, id.AlgorithmMegolmV1},
		Keys: mautrix.KeyMap{
			id.NewDeviceKeyID(id.KeyAlgorithmCurve25519, deviceID): account.IdentityKey().String(),
			id.NewDeviceKeyID(id.KeyAlgorithmEd25519, deviceID):    account.SigningKey().String(),
		},
	}
	keys.Signatures = signatures.NewSingleSignature(olga, id.KeyAlgorithmEd25519, deviceID.String(), must(account.SignJSON(keys))(o.t))
	byOwner := must(o.selfSigning.SignJSON(keys))(o.t)
	keys.Signatures[olga][id.NewKeyID(id.KeyAlgorithmEd25519, o.selfSigning.PublicKey().String())] = byOwner
	o.devices[deviceID] = keys
}

// doubt has none of her devices be hers any more: she signs them with another key, and has not signed any yet. That a signature is not shown
// any more takes nothing back.
func (o *olgasAccount) doubt() {
	o.t.Helper()
	o.selfSigning = must(olm.NewPKSigning())(o.t)
}

func (o *olgasAccount) crossSigningKey(key olm.PKSigning, usage id.CrossSigningUsage, signer olm.PKSigning) mautrix.CrossSigningKeys {
	o.t.Helper()
	keys := mautrix.CrossSigningKeys{
		UserID: olga, Usage: []id.CrossSigningUsage{usage},
		Keys: map[id.KeyID]id.Ed25519{id.NewKeyID(id.KeyAlgorithmEd25519, key.PublicKey().String()): key.PublicKey()},
	}
	if signer != nil {
		keys.Signatures = signatures.NewSingleSignature(olga, id.KeyAlgorithmEd25519, signer.PublicKey().String(), must(signer.SignJSON(keys))(o.t))
	}
	return keys
}

// ServeHTTP answers a /keys/query.
func (o *olgasAccount) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	if o.silent {
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	_ = json.NewEncoder(w).Encode(mautrix.RespQueryKeys{
		DeviceKeys:      map[id.UserID]map[id.DeviceID]mautrix.DeviceKeys{olga: o.devices},
		MasterKeys:      map[id.UserID]mautrix.CrossSigningKeys{olga: o.crossSigningKey(o.master, id.XSUsageMaster, nil)},
		SelfSigningKeys: map[id.UserID]mautrix.CrossSigningKeys{olga: o.crossSigningKey(o.selfSigning, id.XSUsageSelfSigning, o.master)},
	})
}

// newBotWithHook is a bot with a hook on a new database, and that homeserver.
func newBotWithHook(t *testing.T, homeserver http.Handler) *Bot {
	t.Helper()
	server := httptest.NewServer(homeserver)
	t.Cleanup(server.Close)
	b := testBot(t)
	b.client.HomeserverURL, _ = url.Parse(server.URL)
	b.client.DeviceID, b.client.Log, b.client.DefaultHTTPRetries = "BOT", zerolog.Nop(), 0
	b.hook = installedHook(t, b.client)
	return b
}

// Messages of a device stay verified after it was logged out, or its owner has taken back that it is hers: it was hers when they were made.
// Whoever has it now is not obeyed.
func TestDeviceThatAnOperatorHasNoMoreIsNotObeyed(t *testing.T) {
	for name, test := range map[string]struct {
		change func(*olgasAccount)
		why    string
	}{
		"she has it":           {func(*olgasAccount) {}, ""},
		"she has another, too": {func(o *olgasAccount) { o.logIn("LAPTOP") }, ""},
		"it is logged out":     {func(o *olgasAccount) { delete(o.devices, "PHONE") }, whyDeviceGone},
		"another in its place": {func(o *olgasAccount) { delete(o.devices, "PHONE"); o.logIn("LAPTOP") }, whyDeviceGone},
		"it is hers no more":   {func(o *olgasAccount) { o.doubt() }, whyDeviceGone},
		"all devices are gone": {func(o *olgasAccount) { clear(o.devices) }, whyDeviceGone},
	} {
		t.Run(name, func(t *testing.T) {
			account := newOlgasAccount(t)
			account.logIn("PHONE")
			b := newBotWithHook(t, account)
			if err := b.hook.Recheck(t.Context(), []id.UserID{olga}); err != nil {
				t.Fatal(err)
			}
			if why := b.withoutDevice(t.Context(), olga, "PHONE"); why != "" {
				t.Fatalf("before: %s", why)
			}
			test.change(account)
			if err := b.hook.Recheck(t.Context(), []id.UserID{olga}); err != nil && !account.silent {
				t.Fatal(err)
			}
			if why := b.withoutDevice(t.Context(), olga, "PHONE"); why != test.why {
				t.Errorf("%q, want %q", why, test.why)
			}
			if why := b.withoutDevice(t.Context(), olga, "NEVER"); why != whyDeviceGone {
				t.Errorf("a device that she never had: %q", why)
			}
		})
	}
}

// That a device list has changed is known before the new one is: until then nobody can say that the device is still hers.
func TestOperatorWhoseDevicesAreNotKnownIsNotObeyedYet(t *testing.T) {
	account := newOlgasAccount(t)
	account.logIn("PHONE")
	b := newBotWithHook(t, account)
	if err := b.hook.Recheck(t.Context(), []id.UserID{olga}); err != nil {
		t.Fatal(err)
	}
	changed := &mautrix.RespSync{NextBatch: "s1", DeviceLists: mautrix.DeviceLists{Changed: []id.UserID{olga}}, DeviceOTKCount: mautrix.OTKCount{SignedCurve25519: 100}}
	if err := b.client.Syncer.ProcessResponse(t.Context(), changed, "s0"); err != nil {
		t.Fatal(err)
	}
	delete(account.devices, "PHONE")
	account.silent = true
	if why := b.withoutDevice(t.Context(), olga, "PHONE"); why != whyNotSure {
		t.Errorf("without an answer: %q", why)
	}
	account.silent = false
	if why := b.withoutDevice(t.Context(), olga, "PHONE"); why != whyDeviceGone {
		t.Errorf("with the answer: %q", why)
	}
}

// Of whom nothing is known, not even that a device is gone is known.
func TestOperatorOfWhomNothingIsKnownIsNotObeyed(t *testing.T) {
	b := newBotWithHook(t, newOlgasAccount(t))
	if why := b.withoutDevice(t.Context(), olga, "PHONE"); why != whyNotSure {
		t.Errorf("%q", why)
	}
}

func TestRefusalOfAGoneDeviceSaysWhatToDo(t *testing.T) {
	b := testBot(t)
	for _, language := range Languages {
		o := orderFrom(t, language, olga, "verify", "@alice:example.com")
		said := b.refusal(o, whyDeviceGone)
		if said.headline == "" || !strings.Contains(said.known, olga.String()) || !strings.Contains(said.known, "verify") || said.advice == "" {
			t.Errorf("%s: %+v", language, said)
		}
	}
	said := b.refusal(orderFrom(t, "en", olga, "verify", "@alice:example.com"), whyDeviceGone).plain()
	for _, want := range []string{"I do not obey a device that is gone.", "logged out", "Send it from a device that you use."} {
		if !strings.Contains(said, want) {
			t.Errorf("%q is not in %s", want, said)
		}
	}
}

// An operator's word counts only if it is certain to be theirs, also for a question about somebody who is not there.
func TestUserOfAnotherRoomIsToldOfToVerifiedOperatorsOnly(t *testing.T) {
	account := newOlgasAccount(t)
	account.logIn("PHONE")
	b := newBotWithHook(t, account)
	b.config.Trust.Operators = []id.UserID{"@boss:example.com"}
	for code, sender := range map[cryptohook.Code]id.UserID{
		cryptohook.CodeVerified: "@alice:example.com", cryptohook.CodeUnverifiedIdentity: "@boss:example.com", cryptohook.CodeUnsignedDevice: "@boss:example.com",
	} {
		o := orderFrom(t, "en", sender, "user", olga.String())
		o.verdict.Code = code
		if r := b.orderUser(t.Context(), o); r.outcome != outcomeRefused || !strings.Contains(r.words.plain(), olga.String()+" has not joined this room.") ||
			!strings.Contains(r.words.plain(), "only to my operators (@boss:example.com)") {
			t.Errorf("%s, %s: %s", sender, code, r.words.plain())
		}
	}
}
