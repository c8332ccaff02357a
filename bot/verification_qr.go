package bot

import (
	"context"
	"encoding/base64"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// showQRCode sends the picture into the person's room.
func (v *verifications) showQRCode(ctx context.Context, d *dialogue) {
	file, err := paintCode("verification.png", d.qrCode.Bytes())
	if err != nil {
		v.log.Err(err).Msg("Failed to make a QR code")
		return
	}
	content := &event.MessageEventContent{
		MsgType: file.msgType, Body: file.name, FileName: file.name, Mentions: &event.Mentions{},
		Info: &event.FileInfo{MimeType: file.mimeType, Size: len(file.data), Width: file.width, Height: file.height},
	}
	if err = v.bot.upload(ctx, d.roomID, content, file); err != nil {
		v.log.Err(err).Msg("Failed to upload a QR code")
		return
	}
	eventID, sent := v.bot.send(ctx, d.roomID, &event.Content{Parsed: content}, hashOf("verification", d.txnID, "picture"))
	if sent {
		d.notices[eventID] = true
	}
}

// keyBytes decodes a key; nil: it is none.
func keyBytes(key id.Ed25519) []byte {
	raw, err := base64.RawStdEncoding.DecodeString(key.String())
	if err != nil {
		return nil
	}
	return raw
}
