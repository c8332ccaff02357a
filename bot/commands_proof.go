package bot

import (
	"context"
	"encoding/json"
	"errors"
	"strings"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// The command proof: a file by which others can check who sent a message.

// prover makes the file that proves who sent a message: JSON. See [cryptohook.Hook.Prove].
type prover func(ctx context.Context, evt *event.Event) (file []byte, err error)

// orderProof gives a proof of who sent the message that the command replies to.
func (b *Bot) orderProof(ctx context.Context, o *order) response {
	return b.proveMessage(ctx, o, b.prove, b.ownMasterKey())
}

func (b *Bot) prove(ctx context.Context, evt *event.Event) (file []byte, err error) {
	proof, err := b.hook.Prove(ctx, evt)
	if err != nil {
		return nil, err
	}
	return json.Marshal(proof)
}

func (b *Bot) proveMessage(ctx context.Context, o *order, prove prover, ownKey id.Ed25519) response {
	evt, bad := b.messageMeant(ctx, o)
	if bad != nil {
		return *bad
	}
	file, err := prove(ctx, evt)
	unprovable, refused := errors.AsType[*cryptohook.UnprovableError](err)
	switch {
	case refused:
		return unproven(o, evt, unprovable)
	case err != nil:
		return o.failed(ctx, err)
	}
	name := proofName(evt.ID)
	return response{
		words: page{
			o.speech.text(signPlain, "proof.made", vars{"Name": showUser(evt.Sender)}),
			o.speech.about(evt),
			points{above: o.speech.phrase("proof.contents", nil), items: []string{
				o.speech.phrase("proof.shows", nil), o.speech.phrase("proof.does_not_show", nil), o.speech.phrase("proof.my_word", nil),
				o.speech.phrase("proof.as_of", nil),
			}},
			remark(o.speech.phrase("proof.how", nil)),
			codeLine(`sendertrust --verify-proof ` + name + ` --master-key "` + ownKey.String() + `"`),
			advice(o.speech.phrase("proof.own_key", nil)),
		},
		attachments: []attachmentFile{{msgType: event.MsgFile, name: name, mimeType: "application/json", data: file}},
	}
}

// unproven words why there is no proof of a message.
func unproven(o *order, evt *event.Event, why *cryptohook.UnprovableError) response {
	key := "proof.no_" + string(why.Reason)
	if !o.speech.has(key + ".headline") {
		key = "proof.no_proof"
	}
	put := vars{"Name": showUser(evt.Sender), "Headline": o.speech.explain(why.Verdict, evt.Sender).headline, "Reason": showName(string(why.Reason))}
	return refuse(o.speech.text(signCaution, key, put), "no proof: "+string(why.Reason))
}

// proofName is the name of a proof's file: it holds the beginning of the event's ID, as far as that is fit for one.
func proofName(eventID id.EventID) string {
	short := strings.Map(func(c rune) rune {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '_', c == '-':
			return c
		}
		return -1
	}, eventID.String())
	return "sendertrust-proof-" + short[:min(len(short), 8)] + ".json"
}
